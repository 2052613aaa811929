"""Reshapes with the old token count baked in: the new sizes follow from matching old input and output dimensions.

Never by comparing a size with the token count: 197 may be a channel count too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from .token_axes import Axes, NeedsFullLength


@dataclass(frozen=True)
class Group:
    """Input dimensions that a reshape turns into output dimensions of the same product."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def expression(size: Any) -> sympy.Expr:
    """A size as an expression, without asking for its value (which would add a guard)."""
    return size.node.expr if hasattr(size, "node") else sympy.Integer(int(size))


def match_dimensions(before: Sequence[Any], after: Sequence[Any]) -> list[Group]:
    """Split a reshape into the smallest groups of equal product, left to right.

    Raises NeedsFullLength when sizes are symbolic in a way that leaves no unique split.
    """
    old, new = [expression(s) for s in before], [expression(s) for s in after]
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first_i, first_j = i, j
        product_old = product_new = sympy.Integer(1)
        while first_i == i or first_j == j or product_old != product_new:
            grow_old = first_i == i or (first_j != j and _divides(product_old, product_new))
            if grow_old and i < len(old):
                product_old, i = product_old * old[i], i + 1
            elif j < len(new):
                product_new, j = product_new * new[j], j + 1
            elif i < len(old):
                product_old, i = product_old * old[i], i + 1
            else:
                break
            if (i == len(old) and j == len(new)) and product_old != product_new:
                raise NeedsFullLength("its sizes cannot be matched")
        groups.append(Group(tuple(range(first_i, i)), tuple(range(first_j, j))))
    return groups


def _divides(small: sympy.Expr, large: sympy.Expr) -> bool:
    return sympy.fraction(sympy.cancel(large / small))[1] == 1


def reshape_with_tokens(
    before: Sequence[Any], after: Sequence[Any], axes: Axes, live: Sequence[Any], sizes: list[Any]
) -> tuple[list[Any], Axes]:
    """Sizes for the live value, and its token axes after the reshape.

    Args:
        before, after: shapes in the original graph.
        axes: token axes of the live input.
        live: shape of the live input.
        sizes: the size argument of the call, live SymInts included.

    Raises:
        NeedsFullLength: a token axis is split (into a grid) or folded into another axis.
    """
    sizes, dims, batch = list(sizes), [], None
    tokens = {dim: expression(before[dim]) for dim in axes.dims}
    for group in match_dimensions(before, after):
        inside = [dim for dim in group.inputs if dim in tokens]
        if axes.batch in group.inputs and not inside:
            batch = _only(group, after, expression(before[axes.batch]))
        if not inside:
            continue
        target = _only(group, after, tokens[inside[0]])
        if (
            len(inside) > 1
            or target is None
            or any(d not in inside and expression(before[d]) != 1 for d in group.inputs)
        ):
            raise NeedsFullLength("it splits the token axis or folds it into another axis")
        sizes[target] = live[inside[0]]
        dims.append(target)
    return sizes, Axes(tuple(dims), batch, axes.epoch, axes.start)


def _only(group: Group, after: Sequence[Any], size: sympy.Expr) -> int | None:
    """The one output dimension that carries `size` alone, the group's others being 1."""
    full = [dim for dim in group.outputs if expression(after[dim]) != 1]
    if not full and group.outputs:
        return group.outputs[0]
    return full[0] if len(full) == 1 and expression(after[full[0]]) == size else None
