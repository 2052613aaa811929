"""How much of the original's attention sparse attention passes would read, layer by layer and head by head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ..attention_index import Heads
from ..graph import Layer, TokenGraph
from .rotation import Turn
from .sparse_rewrite import SparseInterpreter


class LayerHeads(SparseInterpreter):
    """Runs the original on values, as far as its last layer, and hands out each layer's heads on the way.

    Values are let go of as soon as nothing further on reads them.

    lasting  heads can still be asked for queries and keys at other positions when the run is past their layer
    """

    def __init__(self, graph: TokenGraph, layers: Sequence[int], *, lasting: bool = False) -> None:
        super().__init__(graph, {})
        self._lasting = lasting
        self._at = {graph.sites[graph.layers[index].site].node: graph.layers[index] for index in layers}

    def __call__(self, inputs: Sequence[Any]) -> Iterator[tuple[Layer, Heads]]:
        """Each layer with its heads; `inputs` are the values of all placeholders."""
        self.args_iter = iter(inputs)
        nodes = self._needed()
        unread = _last_readers([(node, [*node.all_input_nodes, *self._rotated_from(node)]) for node in nodes])
        for node in nodes:
            if node.name in self._at:
                yield self._at[node.name], self._heads(self._at[node.name])
            if node is nodes[-1]:
                return
            with torch.no_grad():
                self.env[node] = self.run_node(node)
            for old in unread.get(node, ()):
                if old not in self._kept:
                    del self.env[old]

    @torch.no_grad()
    def _heads(self, layer: Layer) -> Heads:
        return self.heads_at(layer)[0]

    def _rotated_from(self, node: fx.Node) -> Iterator[fx.Node]:
        """What a layer's heads may ask for besides q, k and v, at the node of its attention: what rotates them."""
        if node.name in self._at:
            site = self.graph_.sites[self._at[node.name].site]
            for rotation, name in ((site.q_rotation, site.q), (site.k_rotation, site.k)):
                yield from () if rotation is None else Turn.of(self.graph_, rotation, name).reads

    def _needed(self) -> list[fx.Node]:
        """Nodes up to the last layer's attention; masks, from which several layers take the padding, are kept."""
        sites = [self.graph_.sites[layer.site] for layer in self._at.values()]
        masks = {site.mask.padding_node for site in sites if site.mask.padded}
        nodes = list(self.module.graph.nodes)  # type: ignore[union-attr,arg-type]
        self._kept = {node for node in nodes if node.name in masks}
        if self._lasting:
            self._kept.update(read for node in nodes for read in self._rotated_from(node))
        last = max(i for i, node in enumerate(nodes) if node.name in self._at)
        return nodes[: last + 1]


def _last_readers(nodes: Sequence[tuple[fx.Node, Sequence[fx.Node]]]) -> dict[fx.Node, list[fx.Node]]:
    """By node, those that no later one reads, of nodes with what they read; one that none reads stands by itself."""
    last: dict[fx.Node, fx.Node] = {}
    for node, reads in nodes:
        last[node] = node
        for used in reads:
            last[used] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, reader in last.items():
        found.setdefault(reader, []).append(node)
    return found
