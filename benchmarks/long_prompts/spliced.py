"""A captured model run with sparse attention passes at its sites, without making a new graph first.

The rewrite of a pass runs the captured graph under tracing and lets the pass answer at the attention sites; here the
same interpreter runs on real tensors instead.  It computes what the compiled model computes, which the tests hold, and
a pass with other parameters costs nothing to make.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tamis.graph import TokenGraph
from tamis.passes.sparse_rewrite import Placed, SparseInterpreter
from tamis.runtime.inputs import graph_inputs


class Spliced(SparseInterpreter):
    """`decoder(ids)`: last hidden states [B, N, C], and keys and values of every layer.

    placed  who answers at which attention node; where nobody does, attention is dense
    """

    def __init__(self, graph: TokenGraph, placed: Placed) -> None:
        super().__init__(graph, placed)
        self._finished = _finished(graph)

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        self.env, self._orders = {}, {}
        hidden, *cache = self.run_all(*graph_inputs(self.graph_.program, ((), {"input_ids": ids})))
        return hidden, list(zip(cache[::2], cache[1::2], strict=True))

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and let go of what no later layer needs."""
        value = super().run_node(n)
        for done in self._finished.get(n.name, ()):
            self.env.pop(done, None)
        return value


def _finished(graph: TokenGraph) -> dict[str, list[fx.Node]]:
    """By attention node: what is used for the last time before the attention node of the layer above it."""
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    sites = [graph.node(graph.sites[layer.site].node) for layer in graph.layers]
    last = {node: max((order[user] for user in node.users), default=len(order)) for node in order}
    found, before = {}, -1
    for previous, site in zip([None, *sites], sites, strict=False):
        upto = order[previous] if previous else -1
        found[site.name] = [node for node, place in last.items() if before < place <= upto]
        before = upto
    return found
