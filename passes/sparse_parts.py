"""Attention over a part of the keys with its log-sum-exp, so that several parts make one softmax (`merged`)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..attention_index import AttentionIndex, Heads
from ..kernels.attention import grouped_mix, softmax_of_seen
from .sparse import arguments


def attend_with_lse(index: AttentionIndex, heads: Heads) -> tuple[Tensor, Tensor]:
    """Attention over an index [B, H, N, D], and its log-sum-exp [B, H, N]."""
    out, lse = torch.ops.tamis.block_sparse_attention_with_lse(*arguments(index, heads))
    return out, lse


def attend_beyond(index: AttentionIndex, heads: Heads, distance: int) -> tuple[Tensor, Tensor]:
    """`attend_with_lse` over keys `distance` tokens and more away; causal.

    Those are what causality lets a query read that stands so much earlier; `index.local` counts from there.  `distance`
    is a multiple of `rows` where there are tiles, and less than a window of the model's own.
    """
    rows = distance // index.rows
    ends = None if heads.lengths is None else (heads.lengths - distance).clamp(min=0)
    window = max(heads.window - distance, 0)
    delayed = replace(heads, queries=moved_up(heads.queries, distance), lengths=ends, window=window)
    tiles = None if index.tiles is None else pad(index.tiles, (0, 0, 0, rows), value=-1)[:, :, rows:]
    return moved_back(*attend_with_lse(replace(index, tiles=tiles), delayed), distance)


def attend_by_logits(logits: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Attention [B, H, n, D] of queries to all values by their logits [B, H, n, N], -inf: unread; and log-sum-exp."""
    read = (logits > -torch.inf).any(-1)
    sums = logits.clamp(min=torch.finfo(logits.dtype).min).logsumexp(-1)
    return grouped_mix(softmax_of_seen(logits), heads.values, heads.queries), torch.where(read, sums, -torch.inf)


def moved_up(x: Tensor, tokens: int) -> Tensor:
    """x [B, H, N, D] without its first tokens, as many zeros behind."""
    return pad(x, (0, 0, 0, tokens))[:, :, tokens:]


def moved_back(out: Tensor, lse: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The results of queries that were moved up, where the queries stand; the first ones read nothing."""
    if not tokens:
        return out, lse
    return pad(out, (0, 0, tokens, 0))[:, :, :-tokens], pad(lse, (tokens, 0), value=-torch.inf)[:, :, :-tokens]
