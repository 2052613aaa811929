"""What happens at a cut: build the method's view, trace its plan, apply it, remember the outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ..capture.masks import HIDDEN
from ..capture.projections import projected
from ..errors import MethodFailed, TamisError, TokenShapeConflict, TooManyRemoved
from ..graph import Layer, Site, TokenGraph
from ..rewrite import Outcome
from ..shape_names import named, named_shape
from ..tokens import Attention, Plan, Tokens
from .outputs import token_map
from .plans import in_order
from .reduction import TokenReduction, most_removable
from .stream_state import StreamState, take_rows
from .token_axes import Axes, Restored

if TYPE_CHECKING:
    from .interpreter import ReductionInterpreter

MOST = "the tokens out are the most that a row can hold; how many it does depends on the input"


class CutRunner:
    """Runs the methods placed at the cuts of one graph."""

    def __init__(
        self, graph: TokenGraph, placed: dict[str, list[tuple[Layer, TokenReduction]]], run: ReductionInterpreter
    ) -> None:
        self.graph, self.placed, self.interpreter = graph, placed, run
        self.outcomes: list[Outcome] = []
        self.last: tuple[str, int] = ("", -1)
        self.first_hidden: Tensor | None = None
        self._counted: set[str] = set()
        self._memory: dict[int, dict[str, Tensor]] = {}  # by a method's id
        self.seen: dict[int, tuple[TokenReduction, Tokens]] = {}  # by a method's id: the tokens that it saw last
        self._carried: dict[int, tuple[int, dict[str, Tensor]]] = {}  # by a method's id: since which epoch, and what

    def at(self, node: fx.Node, value: Any) -> Any:
        """The value of a node, reduced if methods run at it."""
        if node.name == self.graph.layers[0].before_attention:
            self.first_hidden = value
        for layer, method in self.placed.get(node.name, ()):
            value = self._stream_value(node, value)
            value = self._reduce(node, value, layer, method)
        return value

    def _stream_value(self, node: fx.Node, value: Tensor) -> Tensor:
        """The stream at this cut with the current token count; the first cut starts the state."""
        run, mark = self.interpreter, self.interpreter.marks.get(node)
        if run.state is None:
            run.state = StreamState(value.shape[0], value.shape[1], self.valid(), value.device, self.graph.grid)
        if isinstance(mark, Restored):
            return run.state.reduce_all(value)
        if run.state.plans and (not isinstance(mark, Axes) or mark.dims != (1,) or mark.epoch != run.state.epoch):
            raise TokenShapeConflict(
                op="cut", reason="the stream lost its token axis on the way here", **run._where(node)
            )
        return value

    def valid(self) -> Tensor | None:
        """[B, N] bool of real tokens, from a padding mask of the stream's attention, the plainest; None without one."""
        masks = [self.graph.sites[layer.site].mask for layer in self.graph.layers]
        padded = [mask for mask in masks if mask.padded and mask.node is not None]
        if not padded:
            return None
        return real_tokens(self._live(min(padded, key=lambda mask: mask.kind != "padding").node or ""))

    def _live(self, name: str) -> Any:
        return self.interpreter.value_of(name)

    def _reduce(self, node: fx.Node, hidden: Tensor, layer: Layer, method: TokenReduction) -> Tensor:
        state, site = self._state, self.graph.sites[layer.site]
        rule = method.rule(layer.index, len(self.graph.layers), self.graph.prefix).resolved(state.first_count)
        count = state.counts[-1]
        known = isinstance(count, int)
        if known:
            self._check_amount(method, layer, site, count)
        if known and rule.removed(count) == 0 and not method.always:
            why = f"nothing can leave: {count} tokens, {self.graph.prefix} of them protected"
            self.outcomes.append(Outcome(str(method), layer.index, site.node, False, why))
            return hidden
        out = torch.ops.tamis.token_count(hidden, 1, self.graph.prefix, rule.flat())
        out = out + rule.appended if rule.appended else out
        tokens = self._tokens(method, hidden, rule, out, layer, site)
        self.seen[id(method)] = method, tokens
        if why := method.why_not_at(tokens):
            self.outcomes.append(Outcome(str(method), layer.index, site.node, False, why))
            return hidden
        plan = plan_of(method, tokens, self.graph)
        if plan is None:
            why = method.note(layer.index, len(self.graph.layers))
            self.outcomes.append(Outcome(str(method), layer.index, site.node, False, why))
            return hidden
        plan = in_order(plan) if self.graph.hides_later else plan
        if plan.weight is None and state.sizes is not None and plan.moved is not None and plan.normalize:
            raise MethodFailed(
                where=f"layer {layer.index}",
                method=method,
                shape=named_shape(hidden, self.graph.program),
                reason="a merging plan without weights would lose the sizes",
                hint="set Plan.weight=tokens.sizes.",
            )
        self.interpreter.marks[node] = Axes((1,), 0, state.epoch + 1)
        self._carried[id(method)] = state.epoch, plan.carry
        hidden = hidden if plan.features is None else plan.features
        reduced = state.advance(hidden, plan, size_bias=method.tracks_sizes, passthrough=method.passthrough)
        self.last = (str(method), layer.index)
        said = [method.note(layer.index, len(self.graph.layers)), MOST * any(one.ragged for one in state.plans)]
        self.outcomes.append(
            Outcome(
                str(method),
                layer.index,
                site.node,
                True,
                "; ".join(filter(None, said)),
                count_text(count),
                count_text(out),
                rule,
            )
        )
        return reduced

    @property
    def _state(self) -> StreamState:
        state = self.interpreter.state
        assert state is not None
        return state

    def _check_amount(self, method: TokenReduction, layer: Layer, site: Site, count: int) -> None:
        """r beyond the tokens is an error at the first layer of a method, clamped later."""
        r = method.asked(layer.index, len(self.graph.layers))
        if r is None or str(method) in self._counted:
            return
        self._counted.add(str(method))
        most = most_removable(method.rule(layer.index, len(self.graph.layers), self.graph.prefix), count)
        if r > most:
            where = f"{method.name} at layer {layer.index} ({site.module or site.node})"
            raise TooManyRemoved(where=where, r=r, tokens=count, protected=self.graph.prefix, most=most)

    def _tokens(self, method: TokenReduction, hidden: Tensor, rule: Any, out: Any, layer: Layer, site: Site) -> Tokens:
        state = self._state
        turned = site.k_rotation
        rotated = {"keys_before_rope": lambda: self._at_site(turned.before, turned.axes)} if turned else {}
        return Tokens(
            hidden=hidden,
            rule=rule,
            out=out,
            prefix=self.graph.prefix,
            layer=layer.index,
            layers=len(self.graph.layers),
            sizes=state.sizes,
            valid=state.valid,
            grid=state.grid,
            lattice=state.lattice,
            weights={name: self._live(node) for name, node in self.interpreter.weights.get(id(method), {}).items()},
            carried=self._brought(method),
            memory=self._memory.setdefault(id(method), {}),
            _tensors={
                "queries": lambda: self._at_site(site.q),
                "keys": lambda: self._at_site(site.k),
                "values": lambda: self._at_site(site.v),
                "normed": lambda: self._normed(site),
                "positions": state.positions,
                "places": lambda: state.places(self.graph.prefix),
                "source": lambda: token_map(state, hidden, state.valid),
                **rotated,
            },
            _attention=lambda: self._attention(site),
        )

    def _brought(self, method: TokenReduction) -> dict[str, Tensor]:
        """What the method's plan before carried, each token of now having its leader's."""
        epoch, carried = self._carried.get(id(method), (0, {}))
        return {name: self._state.gather(value, 1, 0, epoch) for name, value in carried.items()}

    def _at_site(self, name: str, axes: tuple[int, ...] = (0, 1, 2, 3)) -> Tensor:
        """A tensor [B, H, N, D] of the site just passed at the current token count; `axes`: where its node has them."""
        return self._now(self.graph.node(name), 2, axes)

    def _normed(self, site: Site) -> Tensor:
        """[B, N, C] what the projections of a site read."""
        source = projected(self.graph.node(site.k))
        if source is None:
            raise AttributeError("keys of this attention are not made by one linear layer of the hidden state")
        return self._now(source, 1)

    def _now(self, node: fx.Node, dim: int, axes: tuple[int, ...] | None = None) -> Tensor:
        """The value of a node at the current token count; `dim`: its token axis, once its axes are in order."""
        value: Tensor = self.interpreter.env[node]
        mark, state = self.interpreter.marks.get(node), self._state
        epoch = mark.epoch if isinstance(mark, Axes) else 0
        value = value if axes is None or axes == tuple(range(len(axes))) else value.permute(axes)
        return value if epoch == state.epoch else state.gather(value, dim, 0, epoch)

    def _attention(self, site: Site) -> Attention:
        if site.softcap is not None:
            raise NotImplementedError("statistics of attention under a soft cap")
        state, keys, queries = self._state, self._at_site(site.k), self._at_site(site.q)

        def class_row() -> Tensor:
            # left padding stays in front of the class token until a plan makes slots, which appending does not
            packed = any(plan.appended is None for plan in state.plans)
            first = None if state.valid is None or packed else state.valid.to(torch.int64).argmax(1, keepdim=True)
            query = queries[:, :, :1] if first is None else take_rows(queries, first, 2, 0)
            return probabilities(query, self._mask_rows(site, slice(1) if first is None else first))[:, :, 0]

        def rows(index: Tensor) -> Tensor:
            mask = self._mask_rows(site, index)
            mask = _without_later(mask, index, keys) if site.causal else mask
            return probabilities(take_rows(queries, index, 2, 0), mask)

        def probabilities(few: Tensor, mask: Tensor | None) -> Tensor:
            return torch.ops.tamis.attention_rows(few, keys, state.key_bias(), mask, site.scale)

        def columns(weight: Tensor | None, among: Tensor | None) -> Tensor:
            bias, mask = state.key_bias(), self._mask_rows(site, slice(None))
            if among is not None:
                bias = torch.where(among, 0.0 if bias is None else bias, -torch.inf)
            for asking in (state.valid, among):
                if asking is not None:
                    weight = asking if weight is None else weight * asking
            rest = site.scale, site.causal
            lse = torch.ops.tamis.attention_lse(queries, keys, bias, mask, *rest)
            return torch.ops.tamis.attention_received(queries, keys, lse, bias, mask, weight, *rest)

        def whole() -> Tensor:
            mask = self._mask_rows(site, slice(None))
            places = torch.arange(keys.shape[2], device=keys.device).unsqueeze(0)
            every = probabilities(queries, _without_later(mask, places, keys) if site.causal else mask)
            return every if state.valid is None else every.masked_fill(~state.valid[:, None, :, None], 0)

        return Attention(class_row, columns, rows, whole)

    def _mask_rows(self, site: Site, rows: slice | Tensor) -> Tensor | None:
        """[., ., R, N] what a mask for pairs of tokens says of some (a slice, or [B, R]); None without such a mask."""
        if site.mask.node is None or site.mask.kind in ("full", "padding"):
            return None
        mask: Tensor = self._live(site.mask.node)
        mask, state = mask if mask.dim() == 4 else mask[(None,) * (4 - mask.dim())], self._state
        if state.plans:
            leaders = state.leader(0)
            picked = leaders[:, rows] if isinstance(rows, slice) else leaders.gather(1, rows)
            mask = mask.expand(state.batch, -1, -1, -1)
            return take_rows(take_rows(mask, picked, 2, 0), leaders, 3, 0)
        return (
            mask[:, :, rows] if isinstance(rows, slice) else take_rows(mask.expand(state.batch, -1, -1, -1), rows, 2, 0)
        )


def plan_of(method: Any, tokens: Tokens, graph: TokenGraph) -> Plan | None:
    """What a method decides for these tokens; an error of its own is answered with where it was asked."""
    try:
        plan: Plan | None = method.plan(tokens)
    except TamisError:
        raise
    except Exception as error:
        raise MethodFailed(
            where=f"layer {tokens.layer}",
            method=method,
            shape=named_shape(tokens.hidden, graph.program),
            reason=named(f"{type(error).__name__}: {error}", graph.program),
            hint="a method is traced: plain torch, no branch on data.",
        ) from error
    return plan


def _without_later(mask: Tensor | None, index: Tensor, keys: Tensor) -> Tensor:
    """The mask [., ., R, N] of the tokens at index [B, R], who see no later token."""
    seen = (torch.arange(keys.shape[2], device=keys.device) <= index.unsqueeze(-1)).unsqueeze(1)
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, -torch.inf)


def real_tokens(mask: Tensor) -> Tensor:
    """[B, N] bool of the keys that a mask [B, 1, N or 1, N] or [N, N] does not hide as padding: a token sees itself."""
    rows = mask.shape[-2]
    same_for_all = isinstance(rows, int) and rows == 1
    mask = mask.select(-2, 0) if same_for_all else mask
    seen = mask if mask.dtype == torch.bool else mask > HIDDEN
    if not same_for_all:  # of truth values: torch.onnx multiplies by ones and zeros, and 0 * -inf is NaN
        seen = torch.diagonal(seen, dim1=-2, dim2=-1)
    return seen.select(1, 0) if seen.dim() == 3 else seen


def count_text(count: Any) -> Any:
    """A count as outcomes have it: a number, or the name of a symbol."""
    return count if isinstance(count, int) else str(count)
