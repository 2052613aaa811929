"""`Launch` and `Twin`: what runs on a GPU when an op does, as data.

A twin answers with launches instead of making them, because four readers want the same answer: the op that launches
(`run`), the compiler that traces it (`as_torch_op`), the cross-compiler, which has no GPU (`ahead`), and tests that
count launches and bytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from ...op import Op
from .architecture import Architecture, Config

NAMESPACE = "tamis_triton"
_DEFINED: dict[str, Any] = {}
_TYPES: dict[str, Any] = {  # by torch's spelling; torch 2.11 reads no unions
    "Tensor": Tensor,
    "Optional[Tensor]": Optional[Tensor],  # noqa: UP045
    "int": int,
    "List[int]": Sequence[int],
    "float": float,
    "Optional[float]": Optional[float],  # noqa: UP045
    "bool": bool,
    "str": str,
}


@dataclass(frozen=True)
class Launch:
    """One kernel over one grid.

    kernel      a `@triton.jit` function
    grid        one to three counts of programs; int or SymInt
    arguments   by name: tensors (fake ones will do), ints, SymInts, floats, None; counts that differ from call to call
                are `do_not_specialize` arguments of the kernel
    config      block sizes and other `tl.constexpr` by name, warps, stages
    """

    kernel: Any
    grid: tuple[Any, ...]
    arguments: dict[str, Any]
    config: Config = field(default_factory=Config)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__

    @property
    def interpreted(self) -> bool:
        """Whether Triton was told to interpret kernels when this one was defined (TRITON_INTERPRET=1)."""
        return type(self.kernel).__name__ == "InterpretedFunction"


Work = tuple[list[Launch], Any]  # launches in order, and the results they fill: tensors, as the op returns them


@dataclass(frozen=True)
class Twin:
    """How an op runs on a GPU.

    work      (architecture, *arguments of the op) -> Work.  Allocates the results; decides by shapes and types alone,
              never by data, and makes no constant of a SymInt
    examples  arguments on the meta device at the sizes of models: what tests compile for every architecture
    why_not   the arguments of the op -> why these kernels do not serve them; "" when they do
    required  whether running the reference on a GPU instead would defeat the op's purpose
    """

    work: Callable[..., Work]
    examples: Callable[[], Iterable[tuple[Any, ...]]]
    why_not: Callable[..., str] = lambda *_: ""
    required: bool = False


def run(twin: Twin, *args: Any) -> Any:
    """Compute the op: on the GPU its tensors are on, or on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1)."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    launches, results = twin.work(Architecture.of(device), *args)
    with _current(device, args):
        for one in launches:
            if not any(size == 0 for size in one.grid if isinstance(size, int)):
                kernel = one.kernel if one.interpreted else torch.library.wrap_triton(one.kernel)
                options = {} if one.interpreted else one.config.options
                kernel[one.grid](**one.arguments, **one.config.constants, **options)
    return results


def _current(device: torch.device, args: Sequence[Any]) -> AbstractContextManager[Any]:
    """Makes the GPU of real tensors the current one: Triton launches on that, wherever the tensors are."""
    if device.type != "cuda" or torch.compiler.is_compiling() or detect_fake_mode(args) is not None:
        return nullcontext()
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def as_torch_op(op: Op, twin: Twin) -> Any:
    """The op `tamis_triton::NAME`, a `triton_op` that Inductor and AOTInductor see through.  CUDA tensors only."""
    if op.name not in _DEFINED:
        function = _annotated(lambda *args: run(twin, *args), op.schema)
        _DEFINED[op.name] = torch.library.triton_op(f"{NAMESPACE}::{op.name}", function, mutates_args=())
    return getattr(getattr(torch.ops, NAMESPACE), op.name).default


def _annotated(function: Callable[..., Any], schema: str) -> Callable[..., Any]:
    """The function with the signature that a schema spells: `triton_op` of torch 2.11 takes no schema."""
    parsed = torch._C.parse_schema(f"{NAMESPACE}::x{schema}")
    annotated: Any = lambda *args: function(*args)  # noqa: E731  (a def would have a signature of its own)
    parameters = [
        inspect.Parameter(
            one.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=_TYPES[str(one.type)],
            default=one.default_value if one.has_default_value() else inspect.Parameter.empty,
        )
        for one in parsed.arguments
    ]
    several = len(parsed.returns) > 1
    result = tuple[(Tensor,) * len(parsed.returns)] if several else Tensor  # type: ignore[misc]
    annotated.__signature__ = inspect.Signature(parameters, return_annotation=result)
    return annotated
