"""Zero-TPrune: page rank on the graph of attention, after dropping what is like something more important.

Source: Wang et al., "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained
Transformers", CVPR 2024, arXiv 2305.17328; no code was published, and where the paper leaves things open the choices
are those of methods card 5, which `note` puts into the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...counts import exact
from ...errors import BadParameter
from ...graph import TokenGraph
from ...kernels.bipartite_match import unit_vectors
from ...kernels.hash_scores import hash_scores
from ...registry import register
from ...schedule import Schedule
from ...tokens import Plan, Tokens
from ..plans import keep_plan, places, real_count
from ..reduction import TokenReduction

STARTS = ("uniform", "cls")
GROUPINGS = ("sequential_u", "sequential_i", "alternate", "random", "none")
BLOCKS = (1, 3, 6, 9, 11)  # of 12, after which tokens leave


@register("zero-tprune")
@dataclass(frozen=True)
class ZeroTPrune(TokenReduction):
    """Drop tokens after a block in three stages; those that stay are as they were, in their order.

    I': one step of page rank, attention received, ranks the tokens.  S: the less important half are compared with the
    more important one (cosine of the head-mean key before rotary embedding), and those most like a better one leave.
    I: page rank among the others, rows adding up to 1 again; of the rest the least important leave.  Heads are joined
    by the root of the mean of squares over the heads whose importance varies neither too little nor too much.

    Where the paper is open: importance flows along A^T; variance (class token included) is of importance scaled to mean
    1, and all heads count where none is in range; the odd token of two halves is among those that may leave; class,
    distillation and register tokens vote and never leave (published: the class token).  keep_ratio is of all
    unprotected tokens before both stages (published: a retention of the I-stage, and 10 more in the S-stage).

    Args:
        r: tokens dropped per chosen layer.
        keep_ratio: fraction of unprotected tokens kept at each chosen layer, instead of r.
        layers: by default after 1, 3, 6, 9 and 11 of 12 blocks, as published for DeiT-S.
        iterations: steps of page rank in the I-stage, a number or a schedule; by default 30 in the first sixth of the
            depth, 1 in the last third and 5 between.  More than 1 needs the matrix of attention.
        init: importance before the first step, "uniform" or "cls": the class token has sqrt(N) times the others'.
        similar: what leaves in the S-stage, a number of tokens, or with a decimal point a fraction of those that leave
            (published: 10 tokens, which in its schedule is 0.4 of them).  0: no S-stage.
        grouping: who may leave in the S-stage, compared with whom: "sequential_u" the less important half with the
            other; "sequential_i" the reverse; "alternate" every other one in the order of importance, from the least
            on; "random" half of them, drawn; "none" every token with all more important ones.
        vmin: least variance of a head that counts.
        vmax: largest variance of a head that counts.
        seed: another draw of grouping "random".
    """

    where: ClassVar[str] = "after_block"
    needs_attention: ClassVar[bool] = True

    iterations: Any = None
    init: str = "uniform"
    similar: Any = 0.4
    grouping: str = "sequential_u"
    vmin: float = 0.01
    vmax: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations is not None:
            steps = Schedule.of(self.iterations, where=self.name, name="iterations")
            object.__setattr__(self, "iterations", steps)
        steps = [] if self.iterations is None else self.iterations.amounts()
        share = type(self.similar) is float and 0 <= self.similar <= 1
        for name, rule, holds in (
            ("iterations", "whole numbers >= 1", all(isinstance(n, int) and n > 0 for n in steps)),
            ("init", f"one of {', '.join(STARTS)}", self.init in STARTS),
            (
                "similar",
                "a whole number >= 0 or a fraction with a decimal point",
                share or (type(self.similar) is int and self.similar >= 0),
            ),
            ("grouping", f"one of {', '.join(GROUPINGS)}", self.grouping in GROUPINGS),
            ("vmin", "at least 0 and at most vmax", 0 <= self.vmin <= self.vmax),
        ):
            if not holds:
                got = getattr(self, name)
                raise BadParameter(where=self.name, name=name, rule=rule, got=got, hint="see --list-passes.")

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The amounts and steps that were given."""
        return (*super().schedules, *(() if self.iterations is None else (self.iterations,)))

    def default_layers(self, layers: int) -> Sequence[int]:
        """After 1, 3, 6, 9 and 11 of 12 blocks, never the last one."""
        return sorted({max(layers * k // 12, 1) - 1 for k in BLOCKS})

    def steps(self, layer: int, layers: int) -> int:
        """Steps of page rank in the I-stage of a selected layer."""
        if self.iterations is None:
            return 30 if 6 * layer < layers else 5 if 3 * layer < 2 * layers else 1
        return max(1, int(self.at(self.iterations, layer, layers, 1)))

    def note(self, layer: int, layers: int) -> str:
        """The choices that the paper leaves open."""
        steps = self.steps(layer, layers)
        kind = "of those that leave" if isinstance(self.similar, float) else "tokens"
        first = f"S-stage ({self.grouping}) {self.similar} {kind}, I-stage" if self.similar else "I-stage"
        return (
            f"{first} {steps} step{'s' * (steps > 1)} of page rank by A^T from a {self.init} start, rows adding up to"
            f" 1; heads whose variance at mean 1 is {self.vmin} to {self.vmax} count, all of them where none is"
        )

    def why_not(self, graph: TokenGraph) -> str:
        """A start from the class token needs one."""
        if self.init == "cls" and not graph.class_token:
            return "init=cls starts from the class token, and this model has none; init=uniform does not"
        return super().why_not(graph)

    def plan(self, tokens: Tokens) -> Plan:
        """Both stages as one selection: what the S-stage drops comes last in the order of the I-stage."""
        steps = self.steps(tokens.layer, tokens.layers)
        matrix = tokens.attention.matrix() if steps > 1 else None
        if not self.similar:
            return keep_plan(tokens, self._importance(tokens, matrix, tokens.valid, steps))
        gone = self._alike(tokens, self._importance(tokens, matrix, tokens.valid, 1))
        kept = ~gone if tokens.valid is None else tokens.valid & ~gone
        return keep_plan(tokens, self._importance(tokens, matrix, kept, steps).masked_fill(gone, -torch.inf))

    def _importance(self, tokens: Tokens, matrix: Tensor | None, kept: Tensor | None, steps: int) -> Tensor:
        """[B, N] float32 of the kept tokens; without a matrix one step, from the log-sum-exp of attention."""
        start = None if self.init == "uniform" and matrix is None else self._start(tokens, kept)
        if matrix is None:
            return self._joined(tokens.attention.received(start, kept), kept)
        assert start is not None
        return self._joined(torch.ops.tamis.page_rank(matrix, start, kept, steps), kept)

    def _start(self, tokens: Tokens, kept: Tensor | None) -> Tensor:
        """[B, N] float32: 1, and for the class token the root of the number of kept tokens."""
        batch, count = tokens.hidden.shape[:2]
        ones = torch.ones(batch, count, device=tokens.hidden.device) if kept is None else kept.float()
        if self.init == "uniform":
            return ones
        first = torch.arange(count, device=ones.device) == 0
        if tokens.valid is not None:
            first = tokens.valid & (tokens.valid.cumsum(1) == 1)
        return torch.where(first, ones.sum(1, keepdim=True).sqrt(), ones)

    def _joined(self, importance: Tensor, kept: Tensor | None) -> Tensor:
        """[B, N] of importance [B, H, N] in each head: the root of the mean of squares over the heads that count."""
        inside = torch.ones_like(importance[:, :1]) if kept is None else kept.unsqueeze(1).to(importance.dtype)
        count = inside.sum(2, keepdim=True)
        scaled = importance * count / importance.sum(2, keepdim=True).clamp(min=1e-30)
        variance = ((scaled - 1).square() * inside).sum(2) / count.squeeze(2)
        counts = (variance >= self.vmin) & (variance <= self.vmax)
        counts = counts | ~counts.any(1, keepdim=True)
        weight = counts.to(importance.dtype).unsqueeze(2)
        return ((weight * scaled.square()).sum(1) / weight.sum(1)).sqrt()

    def _alike(self, tokens: Tokens, importance: Tensor) -> Tensor:
        """[B, N] bool: the tokens that leave in the S-stage."""
        rank = places(tokens, importance) - tokens.prefix  # below 0 for tokens that never leave, and padding
        count = real_count(tokens)
        offers, takes = self._groups(tokens, rank, count - tokens.prefix)
        unit = unit_vectors(tokens.keys_before_rope.mean(1, dtype=torch.float32))
        hidden = ~takes.unsqueeze(1)
        if self.grouping == "none":
            hidden = hidden | (rank.unsqueeze(1) >= rank.unsqueeze(2))
        best = torch.bmm(unit, unit.transpose(1, 2)).masked_fill(hidden, -torch.inf).amax(2)
        order = places(tokens, best.masked_fill(~offers, -torch.inf)) - tokens.prefix
        return offers & (order < self._leaving(tokens.rule.removed(count)))

    def _groups(self, tokens: Tokens, rank: Tensor, free: Any) -> tuple[Tensor, Tensor]:
        """[B, N] bool each: tokens that may leave, and those they are compared with, by rank of importance."""
        ranked = rank >= 0
        if self.grouping == "none":
            return ranked, ranked
        if self.grouping == "alternate":
            offers = (free - 1 - rank) % 2 == 0
        elif self.grouping == "sequential_i":
            offers = rank < free - free // 2
        else:
            if self.grouping == "random":
                rank = places(tokens, hash_scores(tokens.positions, self.seed, tokens.layer)) - tokens.prefix
            offers = rank >= free // 2
        return ranked & offers, ranked & ~offers

    def _leaving(self, removed: Any) -> Any:
        """How many of the removed tokens leave in the S-stage."""
        if isinstance(self.similar, float):
            share = exact(self.similar)
            return removed * share.numerator // share.denominator
        if isinstance(removed, int):
            return min(removed, self.similar)
        return removed.clamp(max=self.similar)
