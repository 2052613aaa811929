"""Invariants that hold after every pass, as data: each is a name and a question to the graphs before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import BrokenInvariant
from .graph import TokenGraph, op_name, shape_text
from .op import NAMESPACE


def _inputs(before: TokenGraph, after: TokenGraph, restore: bool) -> str:
    """Same placeholders by name and order, so that signature and weights still fit; buffers may be added."""
    old, new = ([n.name for n in g.graph.nodes if n.op == "placeholder"] for g in (before, after))
    added = after.program.graph_signature.inputs_to_buffers.keys() - set(old)
    new = [name for name in new if name not in added]
    return "" if old == new else f"inputs changed from {old} to {new}"


def _weights(before: TokenGraph, after: TokenGraph, restore: bool) -> str:
    """The same state_dict keys, and the tensors of trained methods."""
    odd = set(before.program.state_dict) ^ set(after.program.state_dict)
    odd -= {name for name in after.program.state_dict if name.startswith(f"{NAMESPACE}.")}
    return f"weights appeared or vanished: {', '.join(sorted(odd)[:3])}" if odd else ""


def _outputs(before: TokenGraph, after: TokenGraph, restore: bool) -> str:
    """The original's outputs come first, with its dtypes and, when restored, its sizes."""
    old, new = (_output_values(g) for g in (before, after))
    if len(new) < len(old):
        return f"{len(old) - len(new)} outputs are gone"
    for i, (a, b) in enumerate(zip(old, new, strict=False)):
        if not hasattr(a, "shape"):
            continue
        known = restore and any(
            isinstance(x, int) and isinstance(y, int) and x != y for x, y in zip(a.shape, b.shape, strict=False)
        )
        if a.dtype != b.dtype or len(a.shape) != len(b.shape) or known:
            return f"output {i} was {shape_text(a)} and is {shape_text(b)}"
    return ""


def _no_mean_scatter(before: TokenGraph, after: TokenGraph, restore: bool) -> str:
    """The ONNX exporter turns a scatter with mean into an overwrite, silently (users.md 2.0c)."""
    made = {n.name for n in after.graph.nodes if "scatter_reduce" in op_name(n) and "mean" in n.args}
    return f"node {sorted(made)[0]} is a scatter with mean" if made - {n.name for n in before.graph.nodes} else ""


def _metadata(before: TokenGraph, after: TokenGraph, restore: bool) -> str:
    """Every call that returns something has its value's shape, which lowering reads."""
    calls = (n for n in after.graph.nodes if n.op == "call_function" and "val" not in n.meta)
    bare = [n.name for n in calls if getattr(getattr(n.target, "_schema", None), "returns", True)]
    return f"node {bare[0]} has no shape" if bare else ""


INVARIANTS: tuple[Callable[[TokenGraph, TokenGraph, bool], str], ...] = (
    _inputs,
    _weights,
    _outputs,
    _no_mean_scatter,
    _metadata,
)


def check_invariants(before: TokenGraph, after: TokenGraph, where: str, *, restore: bool) -> None:
    """Raise BrokenInvariant when a rewrite broke a promise that lowering and the caller rely on."""
    for invariant in INVARIANTS:
        reason = invariant(before, after, restore)
        if reason:
            raise BrokenInvariant(where=where, reason=reason)


def _output_values(graph: TokenGraph) -> list[Any]:
    outputs = graph.graph.output_node().args[0]
    return [getattr(o, "meta", {}).get("val") for o in outputs]  # type: ignore[union-attr]
