"""What an op is: one object that says all that is known of it, defined in one file of `kernels/`.

An op in a graph is a `torch.library` op `tamis::NAME` with its reference as implementation on every device (a CPU may
have one of its own) and a shape rule for tracing.  Lowering replaces it: by its reference inlined as ATen on CPU, by
its Triton twin on CUDA where it has one (`triton`), by a model-local function in ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NAMESPACE = "tamis"
CONTRIB = "com.microsoft"  # domain of ONNX Runtime's own operators


@dataclass(frozen=True)
class OnnxCall:
    """One call of a model-local ONNX function in domain `tamis`, or of a standard operator.

    function    an `onnxscript` function whose body uses standard ops (opset 18 or newer), in `Op.contrib` also ONNX
                Runtime's own, or the operator's name
    inputs      in order: tensors; counts (int or SymInt), which become int64 scalars; lists of int, int64 vectors
    attributes  plain ints, floats and strings
    since       version of the standard operators that the call needs
    """

    function: Any
    inputs: list[Any]
    attributes: dict[str, Any]
    since: int = 18

    @property
    def name(self) -> str:
        """Name of the function or operator."""
        return self.function if isinstance(self.function, str) else str(self.function.name)

    @property
    def domain(self) -> str:
        """Its domain."""
        return "" if isinstance(self.function, str) else NAMESPACE


@dataclass(frozen=True)
class Op:
    """Everything known of one op.

    name       `tamis::name`
    schema     arguments and results in torch.library's language, without the name
    reference  the definition in torch: deterministic, float32 arithmetic, calls torch only; traceable by make_fx with
               symbolic shapes (no branch on data)
    fake       shape rule: same arguments, empty results
    onnx       same arguments -> OnnxCall; None where `parts` is what ONNX files get, or only lowering for GPUs makes it
    parts      the definition in other ops of ours
    on_cpu     what a CPU runs where a program calls the op, where that is faster than the reference; same results to
               rounding, never traced
    compiled_on_cpu  same arguments, tensors as nodes -> the function of them, the same to rounding, that
               `torch.compile` traces for a CPU in place of the call; None where the call stays
    contrib    same arguments -> OnnxCall of a function on ONNX Runtime's own operators, or as text why there is none;
               None where standard ones do
    captured   whether models hold it before any pass has run
    flops      same arguments (tensors as shapes) -> floating point operations, multiply and add counted as two
    samples    argument tuples that the generic tests run: reference, fake, ONNX, and later Triton, must agree on them
    triton     module of `tamis.kernels.triton` that has its kernels; None where the reference is inlined on GPUs too
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    onnx: Callable[..., OnnxCall] | None
    flops: Callable[..., int]
    samples: Callable[[], Iterable[tuple[Any, ...]]]
    triton: str | None = None
    parts: Callable[..., Any] | None = None
    contrib: Callable[..., OnnxCall | str] | None = None
    captured: bool = False
    on_cpu: Callable[..., Any] | None = None
    compiled_on_cpu: Callable[..., Callable[..., Any] | None] | None = None

    @property
    def qualified(self) -> str:
        """The name as torch.library knows it."""
        return f"{NAMESPACE}::{self.name}"

    @property
    def call(self) -> Any:
        """The callable `torch.ops.tamis.NAME.default`."""
        import torch

        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


def all_arguments(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[Any]:
    """The arguments of a call of a torch op by position, with the defaults of those left out."""
    left, named = target._schema.arguments[len(args) :], kwargs or {}
    return [*args, *(named.get(one.name, one.default_value) for one in left)]


OPS: dict[str, Op] = {}
_LIBRARY: list[Any] = []


def define_op(op: Op) -> Op:
    """Register the op with torch.library, its FLOPs with torch's flop counter, and list it in OPS."""
    import torch
    from torch.utils.flop_counter import register_flop_formula

    if not _LIBRARY:
        _LIBRARY.append(torch.library.Library(NAMESPACE, "DEF"))
    library = _LIBRARY[0]
    library.define(f"{op.name}{op.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(op.name, op.reference, "CompositeExplicitAutograd")
    if op.on_cpu is not None:
        library.impl(op.name, op.on_cpu, "CPU")
    torch.library.register_fake(op.qualified, op.fake, lib=library)
    register_flop_formula(getattr(torch.ops.tamis, op.name))(op.flops)
    OPS[op.name] = op
    return op
