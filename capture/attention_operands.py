"""What is done to queries, keys and probabilities around the two products of a written-out attention."""

from __future__ import annotations

from typing import Any

from torch import fx

from .nodes import MOVES, axis_order, op_of
from .quantizers import rounding_of


def ends_of(softmax: fx.Node) -> list[fx.Node]:
    """The softmax, and what is made of it one after the other: guarded against NaN, rounded to integers."""
    ends = [softmax]
    while True:
        end = guarded(ends[-1])
        if end is ends[-1]:
            rounded = rounding_of(end)
            if rounded is None:
                return ends
            end = rounded
        ends.append(end)


def guarded(softmax: fx.Node) -> fx.Node:
    """The probabilities: the softmax, or where it is NaN, as in rows without any key, zero.

    Exporters write scaled_dot_product_attention so, which has the same zeros.
    """
    tests = [user for user in softmax.users if op_of(user) == "aten.isnan"]
    guards = [user for test in tests for user in test.users]
    if len(softmax.users) == 2 and len(guards) == 1 and op_of(guards[0]) == "aten.where":
        condition, zero, value = guards[0].args
        if condition is tests[0] and value is softmax and _is_zero(zero):
            return guards[0]
    return softmax


def _is_zero(value: Any) -> bool:
    number = value.args[1] if op_of(value) == "aten.full" else value
    return isinstance(number, int | float) and number == 0


def without_scale(node: Any) -> tuple[fx.Node, float]:
    """The value without the numbers it is multiplied by, and their product."""
    factor = factor_of(node)
    if factor is not None:
        inside, more = without_scale(node.args[0])
        return inside, factor * more
    return node, 1.0


def keys_of(node: Any, *, scaled: bool = True) -> tuple[fx.Node, bool, float]:
    """(keys, whether they are still transposed, scale) from the right operand of the product.

    scaled  whether numbers that the keys are multiplied by are taken out of them, into the scale
    """
    node, scale = without_scale(node) if scaled else (node, 1.0)
    if not _is_transposed(node):
        return node, True, scale
    inside, more = without_scale(node.args[0]) if scaled else (node.args[0], 1.0)
    return inside, False, scale * more


def factor_of(node: Any) -> float | None:
    """The number that a node multiplies its argument by; None when it does something else."""
    if (
        op_of(node) in {"aten.mul", "aten.div"}
        and isinstance(node.args[1], int | float)
        and "rounding_mode" not in node.kwargs
    ):
        return float(node.args[1]) if op_of(node) == "aten.mul" else 1.0 / float(node.args[1])
    return None


def _is_transposed(node: Any) -> bool:
    """Whether the node swaps the last two axes of its argument."""
    if op_of(node) not in MOVES:
        return op_of(node) == "aten.mT"
    *others, a, b = range(node.meta["val"].ndim)
    return axis_order(node) == [*others, b, a]
