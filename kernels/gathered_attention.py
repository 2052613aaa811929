"""Attention over an index by gathering: every row of queries copies the keys it needs, and one dense attention runs.

Plain tensors for every compiler and device, linear in memory where lists are short; unused entries cost as much as
used ones.  The definitions are in block_sparse_attention, block_sparse_with_lse and block_sparse_received.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .attention import capped, grouped_logits, grouped_mix
from .precision import compute_dtype
from .rows import take_rows
from .sparse_pairs import MaybeTensor, Pairs, dense_rows, gathered, of_heads

LOWEST = torch.finfo(torch.float32).min


def attended(
    q: Tensor, k: Tensor, v: Tensor, index: Pairs, scale: float, softcap: float | None, *, lse: bool = False
) -> tuple[Tensor, MaybeTensor]:
    """Attention [B, H, N, Dv] over the pairs of the index, and if asked the log-sum-exp of its logits [B, H, N]."""
    places, seen = gathered(index, q.shape[2], q.shape[1], k.shape[1], q.device)
    out, sums = _over_rows(q, k, v, places, seen, index, scale, softcap, lse)
    return with_dense(out, sums, q, k, v, index, scale, softcap)


def with_dense(
    out: Tensor,
    sums: MaybeTensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Pairs,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, MaybeTensor]:
    """`attended` of the other tokens [B, H, N, Dv], with the first and last tokens, which read every key, in place."""
    if not index.first + index.last:
        return out, sums
    logits, named, _ = _of_dense_rows(q, k, index, scale, softcap)
    few = _mixed(logits, v, q).transpose(1, 2)
    at = named[:, :, None, None].expand(few.shape)
    out = out.transpose(1, 2).scatter(1, at, few).transpose(1, 2)
    if sums is not None:
        at = named.unsqueeze(1).expand(logits.shape[:3])
        sums = sums.scatter(2, at, logits.logsumexp(-1))
    return out, sums


def received(
    q: Tensor, k: Tensor, lse: Tensor, weight: MaybeTensor, index: Pairs, scale: float, softcap: float | None
) -> Tensor:
    """What every key gets of the attention over the pairs of the index, [B, H, N] by its place in memory."""
    return received_by(_from_rows, q, k, lse, weight, index, scale, softcap)


def received_by(
    from_rows: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weight: MaybeTensor,
    index: Pairs,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """`received`, where `from_rows` says what keys get from tokens that do not read everything."""
    dtype = compute_dtype(q)
    lse = torch.where(lse == -torch.inf, torch.inf, lse.to(dtype))
    shares = torch.ones_like(lse) if weight is None else weight.to(dtype).unsqueeze(1).expand(lse.shape)
    few = None
    if index.first + index.last:
        logits, named, once = _of_dense_rows(q, k, index, scale, softcap)
        at = named.unsqueeze(1).expand(logits.shape[:3])
        part = torch.where(once.unsqueeze(1), shares.gather(2, at), 0.0).unsqueeze(-1)
        few = (part * (logits - lse.gather(2, at).unsqueeze(-1)).exp()).sum(2)
        shares = shares.scatter(2, at, 0.0)
    sums = from_rows(q, k, lse, shares, index, scale, softcap)
    return sums if few is None else sums + few


def _from_rows(
    q: Tensor, k: Tensor, lse: Tensor, shares: Tensor, index: Pairs, scale: float, softcap: float | None
) -> Tensor:
    batch, heads, tokens = q.shape[:3]
    places, seen = gathered(index, tokens, heads, k.shape[1], q.device)
    rows = _Rows(q, k, places, index)
    logits = torch.where(rows.of_seen(seen), capped(grouped_logits(rows.q, rows.k, scale), softcap), -torch.inf)
    part = (rows.of(shares) * (logits - rows.of(lse, torch.inf)).exp()).sum(2)  # [B * sets * R, group, K]
    part = part.reshape(batch, rows.sets, rows.count, rows.group, -1).transpose(2, 3).flatten(3)
    at = places.expand(batch, rows.sets, -1, -1).flatten(2).unsqueeze(2).expand(part.shape)
    return part.new_zeros((*part.shape[:3], tokens)).scatter_add(3, at, part).reshape(batch, heads, tokens)


class _Rows:
    """Queries in rows and the keys that each gathers: q [B * sets * R, group, rows, D], k [B * sets * R, 1, K, D]."""

    def __init__(self, q: Tensor, k: Tensor, places: Tensor, index: Pairs) -> None:
        heads, self.count = q.shape[1], places.shape[2]
        self.sets = heads if index.share == "query" else k.shape[1]
        self.rows, self.group = index.rows, heads // self.sets
        self.listed = places.expand(q.shape[0], self.sets, -1, -1).flatten(2).flatten(0, 1)  # [B * sets, R * K]
        self.q, self.k = self.of(q, feature=True), self.keys(k)

    def of(self, x: Tensor, fill: float = 0.0, *, feature: bool = False) -> Tensor:
        """x [B, H, N] in rows [B * sets * R, group, rows, 1], `fill` behind the last; or [B, H, N, D] with D last."""
        x = x if feature else x.unsqueeze(-1)
        batch, _, tokens, size = x.shape
        x = pad(x, (0, 0, 0, self.count * self.rows - tokens), value=fill)
        x = x.reshape(batch, self.sets, self.group, self.count, self.rows, size).transpose(2, 3)
        return x.reshape(batch * self.sets * self.count, self.group, self.rows, size)

    def keys(self, x: Tensor) -> Tensor:
        """Rows of x [B, Hk, N, D] that are listed, [B * sets * R, 1, K, D]."""
        batch, heads, tokens, size = x.shape
        x = x.unsqueeze(2).expand(-1, -1, self.sets // heads, -1, -1).reshape(batch * self.sets, tokens, size)
        found = take_rows(x, self.listed)
        return found.reshape(batch * self.sets * self.count, 1, self.listed.shape[1] // self.count, size)

    def of_seen(self, seen: Tensor) -> Tensor:
        """Who sees whom [b, s, R, rows, K] as [B * sets * R, 1, rows, K]."""
        batch = self.q.shape[0] // (self.sets * self.count)
        seen = seen.expand(batch, self.sets, -1, -1, -1)
        return seen.reshape(batch * self.sets * self.count, 1, self.rows, seen.shape[4])

    def joined(self, x: Tensor, tokens: Any) -> Tensor:
        """x [B * sets * R, group, rows, D] as [B, H, N, D], which in memory is [B, N, H, D]."""
        heads, size = self.sets * self.group, x.shape[3]
        batch = x.shape[0] // (self.sets * self.count)
        x = x.reshape(batch, self.sets, self.count, self.group, self.rows, size).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(batch, self.count * self.rows, heads, size)[:, :tokens].contiguous().transpose(1, 2)


def _over_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor,
    seen: Tensor,
    index: Pairs,
    scale: float,
    softcap: float | None,
    lse: bool,
) -> tuple[Tensor, MaybeTensor]:
    rows = _Rows(q, k, places, index)
    values, seen = rows.keys(v), rows.of_seen(seen)
    if softcap is None and not lse:
        keys, values = (x.expand(-1, rows.group, -1, -1) for x in (rows.k, values))
        out = scaled_dot_product_attention(rows.q, keys, values, attn_mask=seen, scale=scale)
        return rows.joined(torch.where(seen.any(-1, keepdim=True), out, 0.0), q.shape[2]), None
    logits = torch.where(seen, capped(grouped_logits(rows.q, rows.k, scale), softcap), -torch.inf)
    out = rows.joined(_mixed(logits, values, q), q.shape[2])
    if not lse:
        return out, None
    return out, rows.joined(logits.logsumexp(-1, keepdim=True), q.shape[2]).squeeze(-1).contiguous()


def _of_dense_rows(
    q: Tensor, k: Tensor, index: Pairs, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, H, F, N] of the tokens that read everything, -inf where not seen; `named`, `once` as dense_rows."""
    named, once, seen = dense_rows(index, q.shape[0], q.shape[2], q.device)
    seen = seen if index.positions is None else of_heads(seen, q.shape[1], k.shape[1])
    queries = q.gather(2, named[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    logits = capped(grouped_logits(queries, k, scale), softcap)
    return torch.where(seen, logits, -torch.inf), named, once


def _mixed(logits: Tensor, v: Tensor, like: Tensor) -> Tensor:
    """Means of v [B, Hk, M, Dv] by logits [B, H, n, M]; a query all of whose logits are -inf gets 0."""
    weights = logits.clamp(min=LOWEST).softmax(-1)
    out = grouped_mix(weights, v, like)
    return torch.where((logits > -torch.inf).any(-1, keepdim=True), out, 0.0)
