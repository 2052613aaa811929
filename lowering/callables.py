"""`lower`: a program as something to call: eager, or compiled by Inductor.

Inductor sees every count and every dynamic dimension as a symbol of its own, so that one set of kernels serves all
layers and all batches.  A first call at sizes of 0 or 1 (also of rows of queries in sparse attention) and the first of
any other may each compile.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor import config as inductor_config
from torch.export import ExportedProgram
from torch.fx.experimental import _config as symbol_config
from torch.utils import _pytree as pytree

from ..errors import InputMismatch
from ..kernels.symbols import lengths_written_out
from ..target import Target
from .gpu import for_gpu
from .inline import CALLED, inline_ops, place_compiled
from .live_counts import dummy_inputs, lift_counts


def lower(program: ExportedProgram, target: Target, mode: str | None = None) -> nn.Module:
    """A module with the signature of the user's model that computes the program.

    Args:
        program: with tamis ops or without; for `mode` its counts should be symbols (`symbolic_counts()`).
        target: what was asked for; where the weights are decides: on a GPU ops run as kernels, elsewhere inlined.
        mode: None for eager execution, where an op runs its own implementation and nothing need be inlined; else
            Inductor's: "default", "reduce-overhead" or "max-autotune".

    The compiled module runs without autograd; the eager one leaves that to the caller.
    """
    if mode is None:
        return program.module()
    return InductorModule(program, mode)


def ahead_of_time(program: ExportedProgram, path: Path) -> None:
    """Compile the program by AOTInductor into a package at `path`, which must end in .pt2; kernels of ours included."""
    program = for_gpu(program).program if is_on_gpu(program) else program
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(inline_ops(program), package_path=str(path))


def is_on_gpu(program: ExportedProgram) -> bool:
    """Whether the program's weights are on a GPU; of one without any, its example inputs."""
    tensors = [*program.state_dict.values(), *program.constants.values()]
    tensors = tensors or pytree.tree_leaves(program.example_inputs)
    return any(isinstance(one, Tensor) and one.device.type == "cuda" for one in tensors)


class InductorModule(nn.Module):
    """The program compiled by Inductor when first called.

    Raises:
        InputMismatch: the arguments are not packed as the program's example inputs were.
    """

    def __init__(self, program: ExportedProgram, mode: str) -> None:
        super().__init__()
        self.in_spec, self.out_spec = program.call_spec.in_spec, program.call_spec.out_spec
        signature = program.module_call_graph[0].signature
        self.positional = list(getattr(signature, "forward_arg_names", None) or [])
        self.on_gpu = for_gpu(program) if is_on_gpu(program) else None
        program = program if self.on_gpu is None else self.on_gpu.program
        called = CALLED if self.on_gpu is None else ()
        module = inline_ops(program, counts=False, called=called).module(check_guards=False)
        module.graph.set_codegen(fx.graph.CodeGen())  # flat inputs and outputs
        self.placed = self.on_gpu is None and place_compiled(module.graph)
        self.live_counts = lift_counts(module.graph)
        self.inner = fx.GraphModule(module, module.graph)
        self.compiled = torch.compile(self.inner, fullgraph=True, mode=None if mode == "default" else mode)
        self.known: dict[tuple[Any, ...], list[Tensor]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat = self._flatten(args, kwargs)
        sizes = self.live_counts.key(flat)
        flat = [self._marked(place, value) for place, value in enumerate(flat)]
        with torch.no_grad(), lengths_written_out(), _settings(self.placed):
            dummies = self.known.get(sizes)
            results = self._first_call(sizes, flat) if dummies is None else self.compiled(*flat, *dummies)
        return pytree.tree_unflatten(results, self.out_spec)

    def _first_call(self, sizes: tuple[int, ...], flat: list[Any]) -> Any:
        device = next(value.device for value in flat if isinstance(value, Tensor))
        dummies = dummy_inputs(self.live_counts(sizes), device)
        for dummy in dummies:
            torch._dynamo.maybe_mark_dynamic(dummy, 0)
        # a count that equals the batch by chance is no reason to compile the two as one
        with symbol_config.patch(use_duck_shape=False):
            results = self.compiled(*flat, *dummies)
        self.known[sizes] = dummies
        return results

    def _marked(self, place: int, value: Any) -> Any:
        axes = [axis for where, axis, _ in self.live_counts.sizes if where == place]
        if not axes:
            return value
        value = value.detach()  # the mark is an attribute, and the caller's tensor is not ours
        torch._dynamo.maybe_mark_dynamic(value, axes)
        return value

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        arguments, keywords = (self.in_spec.child(i) for i in range(2))
        named = self.positional[len(args) : arguments.num_children]
        args = (*args, *(kwargs[name] for name in named if name in kwargs))
        ordered = {name: kwargs[name] for name in keywords.context if name in kwargs}
        flat, spec = pytree.tree_flatten((args, ordered))
        extra = kwargs.keys() - set(named) - set(ordered)
        if spec != self.in_spec or extra:
            got = f"{len(args)} positional and {sorted(kwargs)} by keyword"
            rule = f"{arguments.num_children} positional and {list(keywords.context)} by keyword"
            raise InputMismatch(where="call", rule=f"arguments are {rule}", got=got, hint="call it as the example was.")
        return flat


def _settings(placed: bool) -> AbstractContextManager[Any]:
    """Inductor's settings around a call of a model with FlexAttention placed in it; of another, they stay as they are.

    Its kernel has buffers for so many threads, and torch 2.11 keeps it under a key that leaves them out: cached by a
    process with fewer threads, it would write behind them.  So it is compiled for the threads there are, and cached for
    no others.  Nothing may be fused behind it: its template refuses that, after the scheduler has decided for it.
    """
    if not placed:
        return nullcontext()
    settings = {"cpp.threads": torch.get_num_threads(), "epilogue_fusion": False}
    return inductor_config.patch(settings)  # type: ignore[no-any-return]
