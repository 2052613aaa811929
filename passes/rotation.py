"""Queries and keys rotated to other positions than their own: the model's rotary embedding, run again.

Nothing is known of how the model spells it: the nodes between what is rotated and the attention run once more, with
other rows of their tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from ..capture.closure import ancestors, descendants
from ..graph import Rotation, TokenGraph
from ..kernels.rows import take_rows


@dataclass(frozen=True)
class Turn:
    """The rotary embedding of one site's queries or keys.

    nodes  what leads from the value before rotation to the rotated one, in the graph's order
    """

    rotation: Rotation
    before: fx.Node
    nodes: tuple[fx.Node, ...]

    @staticmethod
    def of(graph: TokenGraph, rotation: Rotation, rotated: str) -> Turn:
        """That which gives the node called `rotated`."""
        start, end = graph.node(rotation.before), graph.node(rotated)
        inside = (descendants(start, through_sizes=False) & ancestors(end, through_sizes=False)) | {end}
        return Turn(rotation, start, tuple(node for node in graph.graph.nodes if node in inside))

    @property
    def reads(self) -> set[fx.Node]:
        """Nodes whose values it needs."""
        return {one for node in self.nodes for one in node.all_input_nodes} - set(self.nodes)

    def at(self, values: Mapping[fx.Node, Any], x: Tensor, place: Tensor) -> Tensor:
        """x [B, H, N, D], not rotated, as the tokens at `place` are: [N] or [1] for all rows, or [B, N or 1]."""
        axes = {name: (batch, tokens) for name, batch, tokens in self.rotation.tables}
        new = {node: _rows(values[node], *axes[node.name], place) for node in self.reads if node.name in axes}
        new[self.before] = x.permute(sorted(range(4), key=self.rotation.axes.__getitem__))
        for node in self.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), lambda one: new[one] if one in new else values[one])
            new[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return new[self.nodes[-1]]


def _rows(table: Tensor, batch: int, tokens: int, place: Tensor) -> Tensor:
    """Rows of a table at `place` of its tokens; its axes of batch, which it may lack, and tokens count from the end."""
    if place.dim() == 1:
        return table.index_select(tokens, place)
    while table.dim() < -min(batch, tokens):
        table = table.unsqueeze(0)
    table = table.movedim((batch, tokens), (0, 1))
    if isinstance(table.shape[0], int) and table.shape[0] == 1:
        table = table.expand(place.shape[0], *table.shape[1:])
    return take_rows(table, place).movedim((0, 1), (batch, tokens))
