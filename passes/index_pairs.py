"""Which pairs of query and key an attention index reads, written out, and how much of dense attention they hold.

For measuring, not for running: a few queries at a time, so that memory goes with N and not with N * N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention_index import AttentionIndex, Heads
from ..kernels.attention import capped
from ..kernels.sparse_pairs import inverse, of_heads
from .sparse_scores import is_real, repeated

AT_ONCE = 1 << 23  # attention weights held at a time


@dataclass(frozen=True)
class Held:
    """Sums over queries, so that those of several inputs can be added.  H query heads.

    mass     [H] float64  dense attention that is read, of 1 per query
    read     [H] float64  pairs read
    queries  queries counted
    visible  pairs that dense attention reads
    """

    mass: Tensor
    read: Tensor
    queries: int
    visible: int

    def __add__(self, other: Held) -> Held:
        queries, visible = self.queries + other.queries, self.visible + other.visible
        return Held(self.mass + other.mass, self.read + other.read, queries, visible)

    @property
    def recall(self) -> list[float]:
        """Mean part of each head's attention that is read; 1 where no query is counted."""
        return (self.mass / self.queries).tolist() if self.queries else [1.0] * len(self.mass)

    @property
    def density(self) -> list[float]:
        """Part of the pairs that each head reads; 1 where there are none."""
        return (self.read / self.visible).tolist() if self.visible else [1.0] * len(self.read)


def held(
    heads: Heads, indexes: Sequence[AttentionIndex], after: int = 0, every: int = 1, before: int | None = None
) -> list[Held]:
    """How much of the dense attention of some heads each index reads, over real queries at places `after` and later.

    Logits and weights are float32, sums float64.

    every   look at one query of so many, from place `after` on
    before  leave out queries at this place and later
    """
    batch, many, tokens = heads.queries.shape[:3]
    sums = torch.zeros(len(indexes), 2, many, dtype=torch.float64)
    queries = visible = 0
    step = max(1, AT_ONCE // (batch * many * tokens))
    end = tokens if before is None else min(before, tokens)
    places = torch.arange(min(after, end), end, every, device=heads.queries.device)
    for few in places.split(step) if len(places) else ():
        seen = _seen(heads, few)
        weights = _weights(heads, seen, few)
        queries += int(seen.any(-1).expand(batch, -1, -1).sum())
        visible += int(seen.expand(batch, -1, -1, -1).sum())
        for index, both in zip(indexes, sums, strict=True):
            pairs = (_read(index, heads, few) & seen).expand(batch, -1, -1, -1)
            apart = weights.reshape(batch, pairs.shape[1], -1, *weights.shape[2:])
            mass = torch.where(pairs.unsqueeze(2), apart, 0.0).sum(-1).double().sum((0, 3)).flatten()
            read = pairs.sum((0, 2, 3)).double().repeat_interleave(many // pairs.shape[1])
            both += torch.stack([mass, read]).cpu()
    return [Held(mass, read, queries, visible) for mass, read in sums]


def _seen(heads: Heads, queries: Tensor) -> Tensor:
    """[B or 1, 1, q, N] bool: what dense attention reads of queries at places [q]; nothing for padding."""
    real = is_real(heads)
    query = queries.unsqueeze(1)
    key = torch.arange(heads.tokens, device=real.device)
    below = (key <= query) if heads.causal else (key >= 0).expand(len(queries), -1)
    below = below & ((query - key).abs() < heads.window) if heads.window else below
    return (below & real.unsqueeze(1) & real[:, queries].unsqueeze(2)).unsqueeze(1)


def _weights(heads: Heads, seen: Tensor, queries: Tensor) -> Tensor:
    """[B, H, q, N] float32: dense attention."""
    logits = heads.queries[:, :, queries].float() @ repeated(heads.keys, heads).float().transpose(2, 3)
    logits = capped(logits * heads.scale, heads.softcap)
    weights = torch.where(seen, logits, torch.finfo(logits.dtype).min).softmax(-1)
    return torch.where(seen, weights, 0.0)


def _read(index: AttentionIndex, heads: Heads, queries: Tensor) -> Tensor:
    """[B or 1, S, q, N] bool: what the index names for these queries, visible or not."""
    device, tokens = heads.queries.device, heads.tokens
    query = queries.unsqueeze(1)
    key = torch.arange(tokens, device=device)
    named = (key < index.sink) | ((query - key).abs() < index.local) | (query < index.first)
    named = named[None, None]
    if index.last:
        ends = torch.full((1,), tokens, device=device) if heads.lengths is None else heads.lengths
        named = named | (query >= ends.reshape(-1, 1, 1, 1) - index.last)
    row = queries // index.rows
    for lists, width in ((index.tiles, index.width), (index.columns, 1)):
        if lists is not None:
            few = lists[:, :, row[0] : row[-1] + 1].long()
            listed = _by_token(_listed(few, width, tokens), index, heads)
            named = named | listed.index_select(2, row - row[0])
    return named


def _by_token(listed: Tensor, index: AttentionIndex, heads: Heads) -> Tensor:
    """[B, S, r, N] bool over places of keys as one over tokens, for as many heads as have an order of their own."""
    if index.permutation is None:
        return listed
    key_heads = index.permutation.shape[1]
    sets = max(listed.shape[1], key_heads)
    place = inverse(of_heads(index.permutation.long(), sets, key_heads)).unsqueeze(2)
    listed = listed.expand(place.shape[0], sets, -1, -1)
    return listed.gather(3, place.expand(listed.shape))


def _listed(starts: Tensor, width: int, tokens: int) -> Tensor:
    """Tiles [B, S, r, T] as [B, S, r, N] bool."""
    each = starts.unsqueeze(-1) + torch.arange(width, device=starts.device)
    place = torch.where((starts.unsqueeze(-1) >= 0) & (each < tokens), each, tokens).flatten(3)
    marked = torch.zeros(*starts.shape[:3], tokens + 1, dtype=torch.bool, device=starts.device)
    return marked.scatter(3, place, torch.ones_like(place, dtype=torch.bool))[..., :tokens]
