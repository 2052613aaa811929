"""One op call during re-execution, as token-axis rules see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..stream_state import StreamState
from ..token_axes import Axes, Pieces

aten = torch.ops.aten
Answer = tuple[Any, Axes | Pieces | None]
Rule = Callable[["Call"], Answer]
RULES: dict[Any, Rule] = {}


@dataclass
class Call:
    """A node of the original graph with live arguments.

    node     the original node; `node.meta["val"]` and its arguments' metas have the original shapes
    args     live arguments
    axes_of  token axes of an argument node; None where it has none
    state    the stream's composed plans
    prefix   protected leading tokens
    """

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    axes_of: Callable[[Any], Axes | None]
    state: StreamState
    prefix: int

    def axes(self, index: int = 0) -> Axes | None:
        """Token axes of positional argument `index`."""
        return self.axes_of(self.node.args[index]) if index < len(self.node.args) else None

    @property
    def only(self) -> Axes:
        """Token axes of argument 0, which the rule needs to have some."""
        axes = self.axes(0)
        if axes is None:
            from ..token_axes import NeedsFullLength

            raise NeedsFullLength("a token axis comes in where none was expected")
        return axes

    def run(self, *args: Any) -> Any:
        """Run the op on other positional arguments (or its own)."""
        return self.node.target(*(args or self.args), **self.kwargs)  # type: ignore[operator]

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """A parameter by position or keyword."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def original_shape(self, index: int = 0) -> Any:
        """Shape of argument `index` in the original graph."""
        return self.node.args[index].meta["val"].shape  # type: ignore[union-attr]


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Decorator: this rule answers for these ops."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return add


def bring_side(call: Call, value: Tensor, rank: int, axes: Axes, original: Any) -> Tensor:
    """Reduce a side input that meets the stream: a tensor of the original length, aligned with it from the right.

    Every aligned axis that is a token axis of the result and not of size 1 is brought to the stream's count, each slot
    taking its leader's row (for pruning a gather, for merging the destination's row).
    """
    offset = rank - value.dim()
    wanted = [dim for dim in axes.dims if dim >= offset and original[dim - offset] != 1]
    if not wanted:
        return value
    batch = require_batch(axes)
    if offset:
        value = value[(None,) * offset]
    if value.shape[batch] == 1 if isinstance(value.shape[batch], int) else False:
        value = value.expand(*(call.state.batch if d == batch else -1 for d in range(rank)))
    for dim in wanted:
        value = call.state.gather(value, dim, batch, 0, axes.start)
    return value


def require_batch(axes: Axes) -> int:
    """The batch axis; NeedsFullLength when it was folded away."""
    from ..token_axes import NeedsFullLength

    if axes.batch is None:
        raise NeedsFullLength("its batch axis is folded into another axis")
    return axes.batch


def align_epoch(call: Call, value: Tensor, axes: Axes) -> tuple[Tensor, Axes]:
    """Bring a value of an earlier epoch to now."""
    if axes.epoch == call.state.epoch:
        return value, axes
    batch = require_batch(axes)
    for dim in axes.dims:
        value = call.state.gather(value, dim, batch, axes.epoch, axes.start)
    return value, Axes(axes.dims, axes.batch, call.state.epoch, axes.start)
