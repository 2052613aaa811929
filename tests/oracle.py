"""Reduced forwards written by hand: what every rewritten graph must equal.

Nothing here uses the rewriter or the ops that apply plans: the block is spelled out over the model's own submodules,
attention is an explicit softmax, and plans are applied from their definition as one-hot matrices.  Only the method's
own `plan` is shared, because *that* is under test elsewhere and its decisions must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from plan_oracle import apply_plan as apply_plan
from plan_oracle import check_plan as check_plan
from plan_oracle import in_order, rows_of
from plan_oracle import one_hot as one_hot
from torch import Tensor, nn

from tamis.rewrite import parse_passes
from tamis.tokens import Attention, Plan, Tokens
from tamis.weights import TrainedPass

if TYPE_CHECKING:
    from tamis.passes.reduction import TokenReduction


@dataclass
class Stream:
    """The token stream of one forward: what was reduced so far, and what attention must know of it."""

    methods: Sequence[TokenReduction]
    layers: int
    prefix: int
    valid: Tensor | None = None
    grid: tuple[int, int] | None = None  # that the patches of now fill
    lattice: tuple[int, int] | None = field(init=False)  # the last there was
    causal: bool = False  # slots then stand where the last of their tokens stood
    sizes: Tensor | None = None
    size_bias: bool = False
    source: Tensor | None = None
    original_valid: Tensor | None = None
    leaders: Tensor | None = None  # [B, N] original index of every slot's leader
    counts: list[tuple[int, int, int]] = field(default_factory=list)  # (layer, before, after) of every reduction
    plans: list[Plan] = field(default_factory=list)
    carried: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # by a method's id: Tokens.carried
    last: Tensor | None = None  # [B, N0, C] what every original token was when a method that passes it by took it out
    normed: Tensor | None = None
    _qkv: tuple[Tensor, Tensor, Tensor, float] | None = None
    _raw_keys: Tensor | None = None
    _bias: Tensor | float = 0.0
    _placed: Tensor | None = None  # [B, N] place in the lattice, where it is not simply the order of tokens

    def __post_init__(self) -> None:
        self.original_valid, self.lattice = self.valid, self.grid

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        *,
        raw_keys: Tensor | None = None,
        bias: Tensor | float = 0.0,
        normed: Tensor | None = None,
    ) -> Tensor:
        """softmax(q k^T * scale + bias) v, heads joined; [B, H, N, D] each -> [B, N, H * D].

        raw_keys  keys before rotary position embedding, where the model has it
        bias      [B, H, N, N] of the tokens of now (see `pairs`)
        normed    [B, N, C] what q, k and v were projected from
        """
        self._qkv, self._raw_keys, self._bias, self.normed = (q, k, v, scale), raw_keys, bias, normed
        return (self._probabilities() @ v).transpose(1, 2).flatten(2)

    def _probabilities(self) -> Tensor:
        q, k, _, scale = self._now()
        logits = q @ k.transpose(-1, -2) * scale + self._bias
        logits = logits + self._key_bias(logits)[:, None, None]
        nothing = (logits == -torch.inf).all(-1, keepdim=True)  # padding that sees no key: its value must stay a number
        return torch.where(nothing, 0.0, logits.softmax(-1))

    def pool(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of queries [B, H, Q, D] that are no tokens, heads joined -> [B, Q, H * D]."""
        logits = q @ k.transpose(-1, -2) * scale
        return ((logits + self._key_bias(logits)[:, None, None]).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def rows(self, table: Tensor, batch: int) -> Tensor:
        """A table [N0, ...] of original positions for the tokens of now, each taking its leader's row: [B, N, ...]."""
        return table.expand(batch, *table.shape) if self.leaders is None else table[self.leaders]

    def pairs(self, table: Tensor, batch: int) -> Tensor:
        """A table [H, N0, N0] for pairs of original positions, for the tokens of now: [B, H, N, N]."""
        if self.leaders is None:
            return table.expand(batch, *table.shape)
        return torch.stack([table[:, row][:, :, row] for row in self.leaders])

    def _now(self) -> tuple[Tensor, Tensor, Tensor, float]:
        assert self._qkv is not None
        return self._qkv

    def _key_bias(self, like: Tensor) -> Tensor:
        bias = like.new_zeros(like.shape[0], like.shape[-1])
        if self.size_bias and self.sizes is not None:
            bias = bias + self.sizes.to(like.dtype).clamp(min=1e-30).log()
        return bias if self.valid is None else bias.masked_fill(~self.valid, float("-inf"))

    def cut(self, where: str, layer: int, x: Tensor) -> Tensor:
        """The stream after every method that wants this place."""
        for method in self.methods:
            if method.where == where and layer in method.selected(self.layers):
                x = self._reduce(method, layer, x)
        return x

    def _reduce(self, method: TokenReduction, layer: int, x: Tensor) -> Tensor:
        first = x.shape[1] if self.source is None else self.source.shape[1]
        rule = method.rule(layer, self.layers, self.prefix).resolved(first if self.original_valid is None else None)
        nothing = rule.is_identity or (self.original_valid is None and rule.removed(x.shape[1]) == 0)
        if nothing and not method.always:
            return x
        tokens = self._view(method, rule, layer, x)
        plan = method.plan(tokens)
        check_plan(plan, tokens)
        if self.causal:
            plan = in_order(plan)
            check_plan(plan, tokens)
        self.counts.append((layer, x.shape[1], plan.out))
        if method.passthrough:
            self.last = self.restore(x)
        x = apply_plan(plan, x if plan.features is None else plan.features)
        self.carried[id(method)] = plan.carry
        self._compose(plan, tracks=method.tracks_sizes)
        self._follow(plan)
        return x

    def _follow(self, plan: Plan) -> None:
        """Another method at the same place sees the queries, keys and values of the leaders."""
        if self._qkv is None:
            return
        q, k, v, scale = self._qkv
        q, k, v = (rows_of(plan.leader, x) for x in (q, k, v))
        self._qkv = q, k, v, scale
        self._raw_keys = None if self._raw_keys is None else rows_of(plan.leader, self._raw_keys)
        self.normed = None if self.normed is None else rows_of(plan.leader, self.normed[:, None])[:, 0]
        if isinstance(self._bias, Tensor):
            rows = self._bias.expand(len(plan.leader), *self._bias.shape[1:])
            self._bias = rows_of(plan.leader, rows_of(plan.leader, rows).transpose(2, 3)).transpose(2, 3)

    def _view(self, method: TokenReduction, rule: Any, layer: int, x: Tensor) -> Tokens:
        return Tokens(
            hidden=x,
            rule=rule,
            out=rule.out(x.shape[1]),
            prefix=self.prefix,
            layer=layer,
            layers=self.layers,
            sizes=self.sizes,
            valid=self.valid,
            grid=self.grid,
            lattice=self.lattice,
            carried=self.carried.get(id(method), {}),
            weights=method.weights.tensors if isinstance(method, TrainedPass) else {},
            _tensors={
                "queries": lambda: self._now()[0],
                "keys": lambda: self._now()[1],
                "keys_before_rope": lambda: self._now()[1] if self._raw_keys is None else self._raw_keys,
                "values": lambda: self._now()[2],
                "normed": lambda: self.normed,
                "positions": lambda: self._positions(x),
                "places": lambda: self._places(x),
                "source": lambda: self._source_now(x),
            },
            _attention=lambda: Attention(self._class_row, self._received, self._some_rows, self._matrix),
        )

    def _class_row(self) -> Tensor:
        rows = self._probabilities().float()
        if self.valid is None:
            return rows[:, :, 0]
        first = self.valid.int().argmax(1)
        return torch.stack([rows[b, :, i] for b, i in enumerate(first.tolist())])

    def _received(self, weight: Tensor | None, among: Tensor | None) -> Tensor:
        rows, asking = self._matrix(), torch.ones(self._now()[0].shape[0], self._now()[0].shape[2])
        for each in (self.valid, among, weight):
            asking = asking if each is None else asking * each
        if among is not None:
            rows = rows * among[:, None, None]
            rows = rows / rows.sum(-1, keepdim=True).clamp(min=1e-30)
        return torch.einsum("bhij,bi->bhj", rows, asking) / asking.sum(1)[:, None, None]

    def _matrix(self) -> Tensor:
        rows = self._probabilities().float()
        return rows if self.valid is None else torch.where(self.valid[:, None, :, None], rows, 0.0)

    def _some_rows(self, index: Tensor) -> Tensor:
        rows = self._probabilities().float()
        return torch.stack([rows[b, :, chosen] for b, chosen in enumerate(index)])

    def _source_now(self, x: Tensor) -> Tensor:
        if self.source is not None:
            return self.source
        places = torch.arange(x.shape[1]).expand(x.shape[0], -1)
        return places if self.valid is None else places.masked_fill(~self.valid, -1)

    def _positions(self, x: Tensor) -> Tensor:
        batch, now = x.shape[:2]
        length = now if self.source is None else self.source.shape[1]
        everywhere = torch.ones(batch, length, dtype=torch.bool) if self.original_valid is None else self.original_valid
        ranks = (everywhere.long().cumsum(1) - 1).clamp(min=0)
        return ranks if self.leaders is None else ranks.gather(1, self.leaders)

    def _places(self, x: Tensor) -> Tensor:
        in_order = torch.arange(-self.prefix, x.shape[1] - self.prefix).expand(x.shape[0], -1)
        return in_order if self._placed is None else self._placed

    def _compose(self, plan: Plan, *, tracks: bool) -> None:
        before = self._sizes_before(plan)
        merges = plan.moved is not None and plan.counts_sizes
        if plan.sizes is not None:
            self.sizes = plan.sizes
        elif merges or self.sizes is not None:
            self.sizes = torch.einsum("bsn,bn->bs", one_hot(plan).float(), before)
        self.size_bias = self.size_bias or (tracks and self.sizes is not None)
        rows = torch.arange(len(plan.leader))[:, None]
        self.carried = {key: {n: v[rows, plan.leader] for n, v in of.items()} for key, of in self.carried.items()}
        self.leaders = plan.leader if self.leaders is None else self.leaders.gather(1, plan.leader)
        slot = plan.slot if self.source is None else plan.slot.gather(1, self.source.clamp(min=0))
        self.source = slot if self.source is None else torch.where(self.source < 0, -1, slot)
        self._placed = None if plan.grid is not None else self._places(plan.slot).gather(1, plan.leader)
        self.grid = plan.grid
        self.lattice = plan.grid or self.lattice
        self.valid = plan.valid
        self.plans.append(plan)

    def _sizes_before(self, plan: Plan) -> Tensor:
        if self.sizes is not None:
            return self.sizes
        return torch.ones(plan.slot.shape) if self.valid is None else self.valid.float()

    def restore(self, x: Tensor, then: Callable[[Tensor], Tensor] = lambda state: state) -> Tensor:
        """then(the stream's state x [B, N', C]), every original token getting its slot's value.

        Dropped tokens get what `then` makes of what they were if they passed by, else zeros; padding gets zeros.
        """
        values = then(x)
        if self.source is None:
            return values
        full = values.new_zeros(values.shape[0], self.source.shape[1], values.shape[2])
        if self.last is not None:
            full = then(self.last.clone())
            full = full if self.original_valid is None else full.masked_fill(~self.original_valid[..., None], 0.0)
        for b, row in enumerate(self.source):
            full[b, row >= 0] = values[b, row[row >= 0]]
        return full

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the tokens after the prefix, each counted as often as it has original tokens."""
        assert self.original_valid is None
        weight = torch.ones(x.shape[:2]) if self.sizes is None else self.sizes
        weight = weight if self.valid is None else weight * self.valid
        weight = weight[:, self.prefix :, None].to(x.dtype)
        return (x[:, self.prefix :] * weight).sum(1) / weight.sum(1)


@dataclass(frozen=True)
class Answer:
    """outputs in the model's order, and the stream that made them."""

    outputs: list[Tensor]
    stream: Stream


@torch.no_grad()
def reduced_forward(family: Any, model: nn.Module, inputs: Any, passes: Any = ()) -> Answer:
    """The outputs of `model` with `passes`, from the hand-written forward of its family; no passes: the dense model."""
    from oracles import FORWARDS

    args, kwargs = inputs
    make = FORWARDS[family.oracle]
    methods = parse_passes(passes) if passes else []
    outputs, stream = make(model, family, methods, *args, **kwargs)
    return Answer(outputs, stream)
