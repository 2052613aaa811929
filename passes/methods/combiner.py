"""Combiner and CCA-Attention: near tokens one by one, all others as one summary per span.

Sources: Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", NeurIPS 2021, arXiv
2107.05768, sections 3 and 4.1; Chen et al., "Core Context Aware Transformers for Long Context Language Modeling", ICML
2025, arXiv 2412.12465 (methods, llm 1.12 and 1.13).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention_index import Heads
from ...registry import register
from ..span_summaries import attend_to_spans, mixed_in_spans, real_in_spans, weights_in_spans
from ..sparse import SparseAttention
from ..sparse_scores import in_tiles, repeated

POOLS = ("max", "mean")


@register("combiner")
@dataclass(frozen=True)
class Combiner(SparseAttention):
    """Every token reads the tokens of its own span, and of every other span one key and one value.

    The key of a span is its pooled key.  Its value is what the span's pooled query finds in it, the same for every
    query that asks.  So each token has some weight, and the weights of all add up to 1.  Models are trained with it; on
    others it is a coarse approximation.  Fixed spans, not those of logarithmic or axial growth.  Differs: spans are of
    `span` tokens where the published are of sqrt(N); queries and keys are pooled as attention used them, rotated by
    position.  The largest of rotated channels depends on where positions start, their mean does not: under left padding
    "max" gives what it gives without only if the model's positions skip the padding.

    Args:
        span: tokens of a span (published: the root of the length).
        pool: what a span's keys and queries become, their "max" in every channel or their "mean".
        log_size: adds the log of its tokens to a span's logit: so many keys as alike as their mean would weigh that
            much.  Not published; for models that were not trained with summaries.
        layers: layers to use it in; all of them by default.
    """

    bidirectional = True
    indexed = False

    span: int = 64
    pool: str = "max"
    log_size: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(span=("1 or more", self.span >= 1), pool=(f"one of {', '.join(POOLS)}", self.pool in POOLS))

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """Every token is its own span."""
        return cls(span=1)

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        return f"reads its own span of {self.span} tokens and one summary of every other"

    def attend(self, heads: Heads) -> Tensor:
        """Pooled keys; values mixed by what the pooled query attends to."""
        real = real_in_spans(heads, self.span)
        pointers, keys = self.pooled(heads.queries, real), self.pooled(heads.keys, real)
        values = mixed_in_spans(weights_in_spans(heads, pointers, self.span), heads.values, self.span)
        bias = real.float().sum((3, 4)).clamp(min=1).log() if self.log_size else None
        return attend_to_spans(heads, repeated(keys, heads), values, bias, self.span, 1)

    def pooled(self, x: Tensor, real: Tensor) -> Tensor:
        """x [B, H, N, D] by spans, [B, H, M, D]; 0 for a span of padding."""
        spans = in_tiles(x.float(), self.span)
        if self.pool == "mean":
            return torch.where(real, spans, 0.0).sum(3) / real.float().sum(3).clamp(min=1)
        most = torch.where(real, spans, -torch.inf).amax(3)
        return torch.where(real.any(3), most, 0.0)


@register("cca")
@dataclass(frozen=True)
class CCA(SparseAttention):
    """Every token reads the `local` tokens before it, and of every `span` tokens before those one core token.

    The core token is the mean of its group by the attention that the group's last token gives to it; its key and value
    are those of that mean: as both are linear, the same mean of the group's keys and values.  Made for models that were
    trained on with it; on others quality drops.  Differs: as printed, a token may be read twice, by itself and in its
    group (here the window starts behind the last group read).  Unsaid there: a core has the rotary position of its
    group's last token; where a model normalises keys, which is not linear, the mean is of normalised ones.

    Args:
        span: tokens of a group (published: 16).
        local: nearest tokens read one by one, itself among them; up to span - 1 more fill up the first group.
        layers: layers to use it in; all of them by default.
    """

    indexed = False
    moves = True

    span: int = 16
    local: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(span=("1 or more", self.span >= 1), local=("1 or more", self.local >= 1))

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """Every token is its own group."""
        return cls(span=1, local=1)

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        return f"reads the {self.local} nearest tokens and one core of every {self.span} before"

    def attend(self, heads: Heads) -> Tensor:
        """Keys and values of core tokens, by linearity: of the projections, and of the rotation to one position."""
        weights, place = self.weights(heads), torch.arange(heads.tokens, device=heads.queries.device)
        moved = heads.keys_at(self.last(place // self.span, heads)) if self.span > 1 else heads.keys
        keys, values = (mixed_in_spans(weights, x, self.span) for x in (moved, heads.values))
        return attend_to_spans(heads, keys, values, None, self.span, self.local)

    def weights(self, heads: Heads) -> Tensor:
        """Attention of each group's last token to its group: [B, Hk, M, group, span]."""
        group = torch.arange((heads.tokens + self.span - 1) // self.span, device=heads.queries.device)
        return weights_in_spans(heads, heads.queries.index_select(2, self.last(group, heads)), self.span)

    def last(self, group: Tensor, heads: Heads) -> Tensor:
        """Places of the groups' last tokens."""
        return (group * self.span + self.span - 1).clamp(max=heads.tokens - 1)
