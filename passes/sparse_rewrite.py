"""The rewrite of all sparse attention: one re-execution in which methods answer at their attention sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.traceback import set_current_meta

from ..attention_index import Heads, key_heads, some_heads
from ..capture.program import rebuild
from ..error_text import first_line
from ..errors import BadParameter, MethodFailed, TamisError
from ..graph import Layer, Rotation, Site, TokenGraph
from ..rewrite import Outcome, Result
from ..shape_names import named, named_shape
from .cuts import real_tokens
from .layer_choice import able
from .replay import Replay
from .retrace import retrace
from .rotation import Turn
from .sparse import SparseAttention, window_of
from .stream_state import take_rows
from .trained import with_trained


@dataclass(frozen=True)
class Part:
    """A method and the query heads of one layer that it has, ascending."""

    method: SparseAttention
    heads: tuple[int, ...]


Placed = dict[str, tuple[Layer, list[Part]]]  # by attention node; heads in no part stay dense


def sparsify(graph: TokenGraph, methods: Sequence[SparseAttention]) -> Result:
    """Replace attention by attention over an index at the layers, and for the heads, that the methods want."""
    outcomes: list[Outcome] = []
    placed = place(graph, methods, outcomes)
    if not placed:
        return Result(graph, tuple(outcomes))
    trained = ((node, part.method) for node, (_, parts) in placed.items() for part in parts)
    graph, weights = with_trained(graph, trained, len(graph.layers))
    module = retrace(graph.program, SparseInterpreter(graph, placed, weights).run_all)
    for node, (layer, parts) in placed.items():
        outcomes += [Outcome(str(part.method), layer.index, node, True, part.method.reads) for part in parts]
    outcomes.sort(key=lambda o: -1 if o.layer is None else o.layer)
    return Result(graph.with_program(rebuild(graph.program, module)), tuple(outcomes))


def place(graph: TokenGraph, methods: Sequence[SparseAttention], outcomes: list[Outcome]) -> Placed:
    """Which methods have which attention node; layers they cannot take are skipped with the reason.

    Of two that want a head, the later one has it.  Raises BadParameter for layers and heads that do not exist, and
    where heads share a choice with heads that the method does not have.
    """
    placed: Placed = {}
    for method in able(graph, methods, outcomes):
        for index in method.selected(len(graph.layers)):
            layer = graph.layers[index]
            site = graph.sites[layer.site]
            reason = method.why_not_at(site)
            if reason:
                outcomes.append(Outcome(str(method), index, site.node, False, reason))
                continue
            chosen = method.selected_heads(index, len(graph.layers), site.heads)
            before = placed[site.node][1] if site.node in placed else []
            left = _without(before, chosen)
            for lost in (part for part in before if not any(part.method is one.method for one in left)):
                outcomes.append(Outcome(str(lost.method), index, site.node, False, f"{method} has this layer"))
            placed[site.node] = layer, [*left, Part(method, tuple(chosen))]
    for layer, parts in placed.values():
        for part in parts:
            _check_groups(part, layer, graph.sites[layer.site])
    return placed


def _without(parts: Sequence[Part], taken: Sequence[int]) -> list[Part]:
    """The parts without some heads; those with none left are gone."""
    left = [Part(part.method, tuple(head for head in part.heads if head not in taken)) for part in parts]
    return [part for part in left if part.heads]


def _check_groups(part: Part, layer: Layer, site: Site) -> None:
    group = site.heads // site.kv_heads
    if getattr(part.method, "share", "") == "kv" and len({h // group for h in part.heads}) * group != len(part.heads):
        raise BadParameter(
            where=part.method.titled,
            name="heads",
            rule=f"whole groups of {group} where share=kv",
            got=f"{list(part.heads)} at layer {layer.index}",
            hint=f"heads {group} * n to {group} * n + {group - 1} share keys; or share=query.",
        )


class SparseInterpreter(Replay):
    """Runs the original graph; at a placed attention node the method answers instead."""

    def __init__(self, graph: TokenGraph, placed: Placed, weights: dict[int, dict[str, str]] | None = None) -> None:
        super().__init__(graph)
        self.placed = placed
        self.weights = weights or {}  # by a method's id: the nodes of its trained tensors
        self._orders: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, or its methods."""
        with set_current_meta(n):
            if n.name not in self.placed:
                return super().run_node(n)
            layer, parts = self.placed[n.name]
            heads, order = self.heads_at(layer)
            many = self.graph_.sites[layer.site].heads
            if [part.heads for part in parts] == [tuple(range(many))]:
                return self._attend(layer, parts[0].method, heads, order)
            found = [(part.heads, self._attend(layer, part.method, heads.of(part.heads), order)) for part in parts]
            dense = sorted(set(range(many)).difference(*(part.heads for part in parts)))
            return joined([*found, (dense, self._dense(n, layer, dense))] if dense else found)

    def _dense(self, n: fx.Node, layer: Layer, chosen: Sequence[int]) -> Tensor:
        """The original attention of some heads of a layer."""
        site = self.graph_.sites[layer.site]
        own = key_heads(chosen, site.heads // site.kv_heads)
        inputs = {site.q: chosen, site.k: own, site.v: own}

        def of_chosen(arg: fx.Node) -> Any:
            value = self.env[arg]
            if arg.name in inputs:
                return some_heads(value, inputs[arg.name])
            each = arg.name == site.mask.node and value.dim() == 4 and value.shape[1] == site.heads > 1
            return some_heads(value, chosen) if each else value

        args, kwargs = fx.node.map_arg((n.args, n.kwargs), of_chosen)
        return n.target(*args, **kwargs)  # type: ignore[operator]

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
            window=window_of(site) or 0,
            _before_rope=partial(self._before_rope, site.k_rotation, order) if site.k_rotation else None,
            _rotate=lambda what, places: self._rotate(site, what, places, order),
        )
        return heads, order

    def _attend(self, layer: Layer, method: SparseAttention, heads: Heads, order: Any) -> Tensor:
        trained = {name: self.value_of(node) for name, node in self.weights.get(id(method), {}).items()}
        try:
            out = method.attend(replace(heads, weights=trained))
        except TamisError:
            raise
        except Exception as error:
            raise MethodFailed(
                where=f"layer {layer.index}",
                method=method,
                shape=named_shape(heads.queries, self.graph_.program),
                reason=named(f"{type(error).__name__}: {first_line(error)}", self.graph_.program),
                hint="a method is traced: plain torch, no branch on data.",
            ) from error
        return out if order is None else take_rows(out, order[1], 2, 0)

    def _before_rope(self, rotation: Rotation, order: Any) -> Tensor:
        return _ordered(self.env[self.graph_.node(rotation.before)].permute(rotation.axes), order)

    def _rotate(self, site: Site, what: str, places: Tensor, order: Any) -> Tensor | None:
        """The "queries" or "keys" of a site as those of the real tokens at `places` are; None: nothing rotates them."""
        rotation, name = (site.q_rotation, site.q) if what == "queries" else (site.k_rotation, site.k)
        if rotation is None:
            return None
        places = places if order is None else order[0].index_select(1, places)
        return Turn.of(self.graph_, rotation, name).at(self.env, self._before_rope(rotation, order), places)

    def _order(self, site: Site, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places of the real tokens first, in order [B, N]; where each token went [B, N]; how many are real [B]."""
        name = site.mask.padding_node
        if name not in self._orders:
            said = self.value_of(name)
            valid = (real_tokens(said) if site.mask.real is None else said != 0).expand(like.shape[0], -1)
            order = valid.to(torch.int32).sort(dim=1, descending=True, stable=True).indices
            self._orders[name] = order, order.argsort(1), valid.sum(1)
        return self._orders[name]


def joined(parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """Results [B, h, N, D] of some heads each as one of all heads, a view of [B, N, H, D]."""
    places = sorted((head, index, place) for index, (heads, _) in enumerate(parts) for place, head in enumerate(heads))
    runs: list[list[int]] = []
    for _, index, place in places:
        if runs and runs[-1][0] == index and runs[-1][2] == place:
            runs[-1][2] += 1
        else:
            runs.append([index, place, place + 1])
    pieces = [parts[index][1].transpose(1, 2).narrow(2, start, stop - start) for index, start, stop in runs]
    return torch.cat(pieces, 2).transpose(1, 2)


def _ordered(x: Tensor, order: Any) -> Tensor:
    """x [B, H, N, D] with its real tokens first."""
    return x if order is None else take_rows(x, order[0], 2, 0)
