"""Attention to the keys near a query and to one summary of every span of keys farther off.

Spans are `span` neighbouring tokens.  What stands for a span is the method's; here is how its tokens are weighed, and
who sees which summary.  All is float32 and leaves padding out.
Source: methods (llm) 6.2, Combiner and CCA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_index import Heads
from ..kernels.attention import capped
from .sparse_scores import in_tiles, is_real

NEVER = 1 << 40  # a token no prompt has


def real_in_spans(heads: Heads, span: int) -> Tensor:
    """[B or 1, 1, M, span, 1] bool: which places of a span hold a token that is no padding."""
    return in_tiles(is_real(heads).float()[:, None, :, None], span) > 0


def weights_in_spans(heads: Heads, pointers: Tensor, span: int) -> Tensor:
    """Attention of one query per span, [B, H, M, D], to the keys of its span: [B, Hk, M, group, span]; padding 0."""
    batch, many, spans, size = pointers.shape
    keys = in_tiles(heads.keys.float(), span)
    asked = pointers.float().reshape(batch, many // heads.group, heads.group, spans, size).transpose(2, 3)
    logits = capped(asked @ keys.transpose(3, 4) * heads.scale, heads.softcap)
    real = real_in_spans(heads, span).transpose(3, 4)
    weights = torch.where(real, logits, torch.finfo(torch.float32).min).softmax(-1)
    return torch.where(real, weights, 0.0)


def mixed_in_spans(weights: Tensor, x: Tensor, span: int) -> Tensor:
    """Weighted sums of a span's rows: weights [B, Hk, M, group, span], x [B, Hk, N, D] -> [B, H, M, D]."""
    mixed = weights @ in_tiles(x.float(), span)
    return mixed.transpose(2, 3).flatten(1, 2)


def attend_to_spans(heads: Heads, keys: Tensor, values: Tensor, bias: Tensor | None, span: int, local: int) -> Tensor:
    """One softmax over the near keys and the summaries of the spans that hold none of them: [B, H, N, D].

    A query reads the keys of the spans that hold a token less than `local` away from it (where causal: the keys up to
    itself), and the summary of every other span (where causal: before those).  So every token is read once, by itself
    or in its span's summary.

    keys, values  [B, H, M, D]   summaries, M = ceil(N / span)
    bias          [., ., M]      added to a summary's logit; None: 0
    """
    first = torch.arange(keys.shape[2], device=keys.device).unsqueeze(0) * span
    begin = first * 0 if heads.causal else first + 1 - local
    ends = first * 0 + heads.tokens if heads.lengths is None else heads.lengths.unsqueeze(1)
    stop = torch.where(first < ends, first + span + local - 1, NEVER)
    begin = torch.where(first < ends, begin, 0)
    return torch.ops.tamis.summary_attention(
        heads.queries,
        heads.keys,
        heads.values,
        keys.to(heads.keys.dtype),
        values.to(heads.values.dtype),
        bias,
        begin,
        stop,
        heads.lengths,
        span,
        local,
        heads.scale,
        heads.causal,
        heads.softcap,
    )
