"""Cheap estimates of where attention goes, from which sparse attention methods choose.

All compute in float32, leave padding out, and know nothing of the choice.
Source: methods (llm) 6.1, E.lastq, E.pool, E.antidiag; 0.2, rules 4 and 7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..attention_index import Heads
from ..kernels.attention import capped
from ..kernels.hash_scores import hash_scores
from .stream_state import take_rows

WIDEST = 1 << 15  # tiles of a row that random draws tell apart


ROUNDED_UP = 1 + 1e-5  # the largest part of a whole that still is one: sums of parts may round above 1


def shared(scores: Tensor, heads: Heads, share: str) -> Tensor:
    """Scores [B, H, ...] of query heads as those of who shares a list, [B, S, ...]: their mean."""
    if share == "query":
        return scores
    if share == "layer":
        return scores.mean(1, keepdim=True)
    batch, of_queries = scores.shape[:2]
    return scores.reshape(batch, of_queries // heads.group, heads.group, *scores.shape[2:]).mean(2)


def repeated(keys: Tensor, heads: Heads) -> Tensor:
    """Keys [B, Hk, ...] for every query head, [B, H, ...]."""
    return keys.repeat_interleave(heads.group, 1) if heads.group > 1 else keys


def is_real(heads: Heads) -> Tensor:
    """[B or 1, N] bool: which tokens are no padding."""
    place = torch.arange(heads.tokens, device=heads.queries.device).unsqueeze(0)
    return place >= 0 if heads.lengths is None else place < heads.lengths.unsqueeze(1)


def in_tiles(x: Tensor, block: int) -> Tensor:
    """x [B, H, N, D] in tiles of `block` tokens, zeros behind the last: [B, H, R, block, D]."""
    batch, heads, tokens, size = x.shape
    count = (tokens + block - 1) // block
    return pad(x, (0, 0, 0, count * block - tokens)).reshape(batch, heads, count, block, size)


def tile_means(x: Tensor, heads: Heads, block: int) -> Tensor:
    """Mean of the real tokens in each tile: x [B, H, N, D] -> [B, H, R, D]; 0 for a tile of padding."""
    real = is_real(heads).float()[:, None, :, None]
    return in_tiles(x.float() * real, block).sum(3) / in_tiles(real, block).sum(3).clamp(min=1)


def real_tiles(heads: Heads, block: int) -> Tensor:
    """[B or 1, 1, R] bool: which tiles hold a token that is no padding."""
    return in_tiles(is_real(heads).float()[:, None, :, None], block).sum((3, 4)) > 0


def seen_tiles(heads: Heads, block: int) -> Tensor:
    """[B or 1, 1, R, R] bool: which tiles of keys a row may read, of those that hold tokens."""
    real = real_tiles(heads, block)
    row = torch.arange(real.shape[2], device=real.device)
    seen = (row <= row.unsqueeze(1)) if heads.causal else (row >= 0)
    return seen & near_tiles(heads, row, block) & real.unsqueeze(2)


def near_tiles(heads: Heads, place: Tensor, block: int) -> Tensor:
    """[R, R] bool: which tiles, at places [R], hold a pair within the window of the attention; all without one."""
    apart = (place.unsqueeze(1) - place).abs()
    return (apart - 1) * block + 1 < heads.window if heads.window else apart >= 0


def first_seen(heads: Heads, rows: int) -> Tensor:
    """[R, 1] the first place that a query of each row of `rows` may see; 0 without a window."""
    first = torch.arange((heads.tokens + rows - 1) // rows, device=heads.queries.device).unsqueeze(1) * rows
    return (first + 1 - heads.window).clamp(min=0) if heads.window else first * 0


def pooled_logits(heads: Heads, keys: Tensor, block: int) -> Tensor:
    """Products of the mean queries and mean keys [B, Hk, N, D] of tiles, scaled: [B, H, R, R]."""
    queries, means = (tile_means(x, heads, block) for x in (heads.queries, keys))
    return queries @ repeated(means, heads).transpose(2, 3) * heads.scale


def last_places(heads: Heads, many: int) -> Tensor:
    """Places [B, many] of the last real tokens, ascending; below 0 where there are fewer."""
    device = heads.queries.device
    ends = torch.arange(heads.queries.shape[0], device=device) * 0 + heads.tokens
    ends = ends if heads.lengths is None else heads.lengths
    return ends.unsqueeze(1) - many + torch.arange(many, device=device)


def last_queries(heads: Heads, many: int) -> tuple[Tensor, Tensor]:
    """Attention of the last `many` real tokens to all, [B, H, many, N]; their places [B, many], below 0 where none is.

    A row of a token that there is not is 0.
    """
    place = last_places(heads, many)
    queries = take_rows(heads.queries, place.clamp(min=0), 2, 0).float()
    logits = capped(queries @ repeated(heads.keys, heads).float().transpose(2, 3) * heads.scale, heads.softcap)
    key = torch.arange(heads.tokens, device=place.device)
    seen = (key <= place.unsqueeze(-1)).unsqueeze(1)
    if heads.window:
        seen = seen & (place.unsqueeze(-1) - key < heads.window).unsqueeze(1)
    there = (place >= 0)[:, None, :, None]
    weights = torch.where(seen, logits, torch.finfo(torch.float32).min).softmax(-1)
    return torch.where(there & seen, weights, 0.0), place


def diagonal_sums(weights: Tensor, place: Tensor) -> Tensor:
    """Sums along diagonals: weights [B, H, m, N] of queries at place [B, m] -> [B, H, N] by distance i - j."""
    distance = torch.arange(weights.shape[3], device=weights.device)
    key = place.unsqueeze(-1) - distance  # [B, m, N]
    found = weights.gather(3, key.clamp(min=0).unsqueeze(1).expand(weights.shape))
    return torch.where((key >= 0).unsqueeze(1), found, 0.0).sum(2)


def best(scores: Tensor, count: Any, allowed: Tensor, forced: Tensor) -> Tensor:
    """The `count` places of highest score [B, S, N], forced ones first: [B, S, count] ascending, -1 last for none.

    Ties: lowest place.
    """
    ranked = torch.where(allowed, torch.where(forced, torch.inf, scores), -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    tokens = scores.shape[-1]
    order = torch.where(allowed.expand(order.shape).gather(-1, order), order, tokens)
    room = torch.arange(count, device=scores.device)
    order = torch.cat([order, room.expand(*order.shape[:-1], -1) * 0 + tokens], -1).index_select(-1, room)
    order = order.sort(dim=-1).values
    return torch.where(order < tokens, order, -1)


def antidiagonal_scores(heads: Heads, block: int, stride: int) -> Tensor:
    """How much attention tiles get, by every stride-th antidiagonal: [B, H, R, C]; rows add up to block / stride.

    Groups of `stride` queries (reversed) and keys are one long vector each; what they multiply to is the sum along an
    antidiagonal.
    """
    device, size = heads.queries.device, heads.queries.shape[3]
    real = is_real(heads)[:, None, :, None]
    queries, keys = (
        in_tiles(torch.where(real, x.float(), 0.0), block) for x in (heads.queries, repeated(heads.keys, heads))
    )
    batch, many, rows = queries.shape[:3]
    per = block // stride
    queries = queries.reshape(batch, many, rows * per, stride, size).flip(3).reshape(batch, many, rows * per, -1)
    keys = keys.reshape(batch, many, rows * per, stride * size)
    logits = queries @ keys.transpose(2, 3) * (heads.scale / stride)
    group = torch.arange(rows * per, device=device)
    seen: Any = (group <= group.unsqueeze(1))[None, None] if heads.causal else (group >= 0)[None, None, None]
    if heads.lengths is not None:
        seen = seen & (group * stride < heads.lengths.reshape(-1, 1, 1, 1))
    seen = seen & near_tiles(heads, group, stride)
    weights = torch.where(seen, logits, torch.finfo(torch.float32).min).softmax(-1)
    return torch.where(seen, weights, 0.0).reshape(batch, many, rows, per, rows, per).sum((3, 5))


def drawn_tiles(heads: Heads, block: int, seed: int, scope: Tensor | None = None) -> Tensor:
    """Random scores of tiles [1, 1, R, C] from an integer hash of (seed, layer, row, tile), the same for all inputs.

    scope  int64 [1, S, 1, 1]: another draw for each of its values, [1, S, R, C]
    """
    tile = torch.arange((heads.tokens + block - 1) // block, device=heads.queries.device)
    return hash_scores(tile.unsqueeze(1) * WIDEST + tile[None, None, None], seed, heads.layer, scope).float()


def ranks(scores: Tensor) -> Tensor:
    """Rank of each entry along the last axis, 0 for the highest; ties: lowest index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)


def covering(scores: Tensor, part: float, *, crossing: bool) -> Tensor:
    """Bool: the highest scores (0 or more) of the last axis that add up to at most `part`, of a sum of 1.

    crossing  the one with which the sum passes `part` is among them.  A part of 1 and more covers everything.
    """
    if part >= 1:
        return scores >= 0
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    sums = ordered.cumsum(-1)
    inside = (sums - ordered < part) if crossing else (sums <= part)
    return inside.gather(-1, order.argsort(-1))
