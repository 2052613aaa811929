"""The rewrite of all sparse attention: one re-execution in which methods answer at their attention sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.traceback import set_current_meta

from ..attention_index import Heads
from ..capture.program import rebuild
from ..error_text import first_line
from ..errors import MethodFailed, TamisError
from ..graph import Layer, Site, TokenGraph, shape_text
from ..rewrite import Outcome, Result
from .cuts import real_tokens
from .layer_choice import able
from .replay import Replay
from .retrace import retrace
from .sparse import SparseAttention
from .stream_state import take_rows

Placed = dict[str, tuple[Layer, SparseAttention]]


def sparsify(graph: TokenGraph, methods: Sequence[SparseAttention]) -> Result:
    """Replace attention by attention over an index at the layers that the methods want."""
    outcomes: list[Outcome] = []
    placed = place(graph, methods, outcomes)
    if not placed:
        return Result(graph, tuple(outcomes))
    module = retrace(graph.program, SparseInterpreter(graph, placed).run_all)
    for node, (layer, method) in placed.items():
        outcomes.append(Outcome(str(method), layer.index, node, True, method.reads))
    outcomes.sort(key=lambda o: -1 if o.layer is None else o.layer)
    return Result(graph.with_program(rebuild(graph.program, module)), tuple(outcomes))


def place(graph: TokenGraph, methods: Sequence[SparseAttention], outcomes: list[Outcome]) -> Placed:
    """Which method has which attention node; layers it cannot take are skipped with the reason."""
    placed: Placed = {}
    for method in able(graph, methods, outcomes):
        for index in method.selected(len(graph.layers)):
            layer = graph.layers[index]
            site = graph.sites[layer.site]
            reason = method.why_not_at(site)
            if reason:
                outcomes.append(Outcome(str(method), index, site.node, False, reason))
                continue
            if site.node in placed:
                before = str(placed[site.node][1])
                outcomes.append(Outcome(before, index, site.node, False, f"{method} has this layer"))
            placed[site.node] = layer, method
    return placed


class SparseInterpreter(Replay):
    """Runs the original graph; at a placed attention node the method answers instead."""

    def __init__(self, graph: TokenGraph, placed: Placed) -> None:
        super().__init__(graph)
        self.placed = placed
        self._orders: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, or its method."""
        with set_current_meta(n):
            if n.name not in self.placed:
                return super().run_node(n)
            return self._attend(*self.placed[n.name])

    def heads_at(self, layer: Layer) -> tuple[Heads, Any]:
        """A layer's heads, and how to put their tokens back: `_order`, or None where nothing was moved."""
        site = self.graph_.sites[layer.site]
        q, k, v = (self.env[self.graph_.node(name)] for name in (site.q, site.k, site.v))
        order = self._order(site, q) if site.mask.padded else None
        heads = Heads(
            queries=_ordered(q, order),
            keys=_ordered(k, order),
            values=_ordered(v, order),
            lengths=None if order is None else order[2],
            scale=site.scale,
            causal=site.hides_later,
            softcap=site.softcap,
            layer=layer.index,
            layers=len(self.graph_.layers),
            _before_rope=self._before_rope(site, order) if site.k_before_rope else None,
        )
        return heads, order

    def _attend(self, layer: Layer, method: SparseAttention) -> Tensor:
        heads, order = self.heads_at(layer)
        try:
            out = method.attend(heads)
        except TamisError:
            raise
        except Exception as error:
            raise MethodFailed(
                where=f"layer {layer.index}",
                method=method,
                shape=shape_text(heads.queries),
                reason=f"{type(error).__name__}: {first_line(error)}",
                hint="a method is traced: plain torch, no branch on data.",
            ) from error
        return out if order is None else take_rows(out, order[1], 2, 0)

    def _before_rope(self, site: Site, order: Any) -> Any:
        return lambda: _ordered(self.env[self.graph_.node(site.k_before_rope)].permute(site.rope_axes), order)

    def _order(self, site: Site, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places of the real tokens first, in order [B, N]; where each token went [B, N]; how many are real [B]."""
        name = site.mask.node or ""
        if name not in self._orders:
            valid = real_tokens(self.value_of(name)).expand(like.shape[0], -1)
            order = valid.to(torch.int32).sort(dim=1, descending=True, stable=True).indices
            self._orders[name] = order, order.argsort(1), valid.sum(1)
        return self._orders[name]


def _ordered(x: Tensor, order: Any) -> Tensor:
    """x [B, H, N, D] with its real tokens first."""
    return x if order is None else take_rows(x, order[0], 2, 0)
