"""`place_twins`: on a GPU, tamis ops that have kernels become the `triton_op`s that launch them.

    %out = tamis.restore_tokens(%y, %source)     ->     %out = tamis_triton.restore_tokens(%y, %source)

Inductor and AOTInductor see through the latter.  What has no kernel, or none for its arguments, keeps its node, and is
inlined like on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..op import Op, all_arguments
from ..target_errors import KernelRefuses
from .splice import op_of


@dataclass(frozen=True)
class Placed:
    """One tamis node on its way to a GPU.

    node       its name in the graph
    op         what it computes
    twin       how it runs on a GPU; None where its reference is inlined
    reason     why it is; "" when it has kernels
    arguments  by position: fake tensors and sizes, as capture left them in the graph
    """

    node: str
    op: Op
    twin: Any
    reason: str
    arguments: tuple[Any, ...]


def place_twins(graph: fx.Graph) -> list[Placed]:
    """Put the twins of all ops that have one into a graph, in place; what became of every tamis node, in order.

    Raises:
        KernelRefuses: an op that saves nothing without its kernel (`Twin.required`) has none for its arguments.
    """
    from ..kernels.triton.launch import as_torch_op

    placed = []
    for node in graph.nodes:
        op = op_of(node)
        if op is None or op.name == "token_count":
            continue
        one = _placed(node, op)
        if one.twin is not None:
            node.target = as_torch_op(op, one.twin)
        placed.append(one)
    return placed


def require_kernels(graph: fx.Graph) -> None:
    """Raise KernelRefuses where a graph cannot be placed (see `place_twins`), and change nothing."""
    for node in graph.nodes:
        op = op_of(node)
        if op is not None and op.triton is not None:
            _placed(node, op)


def _placed(node: fx.Node, op: Op) -> Placed:
    from ..kernels.triton import twin_of

    given = tuple(all_arguments(op.call, node.args, node.kwargs))
    arguments, twin = fx.map_arg(given, lambda one: one.meta["val"]), twin_of(op)
    reason = "it has no kernel" if twin is None else twin.why_not(*arguments)
    if reason and twin is not None and twin.required:
        hint = "choose what the kernel has (the pass's block, the model's type), or another target."
        raise KernelRefuses(node=node.name, op=op.name, reason=reason, hint=hint)
    return Placed(node.name, op, None if reason else twin, reason, arguments)
