"""Token counts as inputs of a graph, so that a compiler sees each as one symbol without history.

    %n = tamis.token_count(%x, 1, ...)     ->     %n = sym_size(%count_0, 0)

`count_0` is a storage-free tensor [n, 0] among the inputs, and `LiveCounts` computes n in Python before every call.
Written as arithmetic on sizes instead, every cut would give its layer kernels of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..counts import CountRule
from ..errors import BrokenInvariant
from .splice import fake_mode_of, op_of

Size = int | Callable[[dict[Any, int]], int]  # a number, or a function of the values of symbols


@dataclass(frozen=True)
class Count:
    """One token_count node: the size it reads, its rule, and the symbol that later sizes know it by (if any)."""

    before: Size
    rule: CountRule
    symbol: Any


@dataclass(frozen=True)
class LiveCounts:
    """Every count of a graph, from the shapes of the tensors it is called with.

    sizes   (input, axis, symbol) for every symbolic dimension of an input
    counts  in the order of the graph: a count may read those before it
    """

    sizes: tuple[tuple[int, int, Any], ...]
    counts: tuple[Count, ...]

    def key(self, inputs: list[Any]) -> tuple[int, ...]:
        """The live sizes that counts (and compiled code) depend on."""
        return tuple(inputs[place].shape[axis] for place, axis, _ in self.sizes)

    def __call__(self, key: tuple[int, ...]) -> list[int]:
        """The counts at these sizes."""
        values = {symbol: size for (_, _, symbol), size in zip(self.sizes, key, strict=True)}
        result = []
        for one in self.counts:
            before = one.before if isinstance(one.before, int) else one.before(values)
            result.append(one.rule.out(before))
            values[one.symbol] = result[-1]
        return result


def lift_counts(graph: fx.Graph) -> LiveCounts:
    """Replace every token_count of the graph by the size of an input added behind the others, in place.

    Raises:
        BrokenInvariant: a count reads a size that no input has.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    sizes = _symbolic_sizes(inputs)
    known = {symbol for _, _, symbol in sizes}
    counts: list[Count] = []
    for node in list(graph.nodes):
        op = op_of(node)
        if op is None or op.name != "token_count":
            continue
        like, axis, prefix, rule = node.args
        before, symbol = _size(like.meta["val"].shape[axis], known, node), _expression(node.meta["val"])
        _replace_by_input(node, f"count_{len(counts)}", inputs)
        known.add(symbol)
        counts.append(Count(before, CountRule.from_flat(prefix, list(rule)), symbol))
    return LiveCounts(tuple(sizes), tuple(counts))


def _symbolic_sizes(inputs: list[fx.Node]) -> list[tuple[int, int, Any]]:
    return [
        (place, axis, _expression(size))
        for place, node in enumerate(inputs)
        for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ()))
        if isinstance(size, torch.SymInt)
    ]


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _size(size: Any, known: set[Any], node: fx.Node) -> Size:
    expression = _expression(size)
    if not isinstance(size, torch.SymInt) or expression.is_number:
        return int(expression)
    unknown = expression.free_symbols - known
    if unknown:
        reason = f"the count {node.name} reads {expression}, and no input has the size {unknown.pop()}"
        raise BrokenInvariant(where="lowering", reason=reason)
    return lambda values: int(expression.xreplace({s: _integer(values[s]) for s in expression.free_symbols}))


def _integer(value: int) -> Any:
    import sympy

    return sympy.Integer(value)


def _replace_by_input(node: fx.Node, name: str, inputs: list[fx.Node]) -> None:
    graph, count = node.graph, node.meta["val"]
    with graph.inserting_after(inputs[-1]):
        dummy = graph.placeholder(name)
    with fake_mode_of(graph):
        dummy.meta["val"] = torch.empty(count, 0)
    inputs.append(dummy)
    with graph.inserting_before(node):
        size = graph.call_function(torch.ops.aten.sym_size.int, (dummy, 0))
    size.meta = dict(node.meta)
    node.replace_all_uses_with(size)
    graph.erase_node(node)


def dummy_inputs(counts: list[int], device: torch.device) -> list[Tensor]:
    """One tensor [count, 0] for each count."""
    return [torch.empty(count, 0, device=device) for count in counts]
