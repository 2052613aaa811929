"""What an attention index says, pair by pair, and attention over exactly those pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from tamis.attention_index import AttentionIndex, Heads


def fixture() -> Heads:
    """16 tokens, two query heads, one key head, head size 4, without randomness (methods, llm 0.4)."""
    h, i, c = torch.arange(2).reshape(2, 1, 1), torch.arange(16).reshape(1, 16, 1), torch.arange(4)
    q = (((3 * h + 1) * (7 * i + 11 * c + 5)) % 37 - 18) / 8
    k = (((2 * h[:1] + 1) * (5 * i + 13 * c + 3)) % 41 - 20) / 7
    v = (((h[:1] + 1) * (3 * i + 5 * c + 1)) % 29 - 14) / 7
    return Heads(q.double()[None], k.double()[None], v.double()[None], None, 0.5, True, None, 0, 1)


def drawn(
    seed: int,
    tokens: int,
    *,
    batch: int = 2,
    kv: int = 2,
    group: int = 2,
    size: int = 16,
    lengths: list[int] | None = None,
    window: int = 0,
) -> Heads:
    """Random heads whose attention is far from even."""
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, kv * group, tokens, size, generator=generator)
    k, v = (torch.randn(batch, kv, tokens, size, generator=generator) for _ in range(2))
    ends = None if lengths is None else torch.tensor(lengths)
    return Heads(q, k, v, ends, size**-0.5, True, None, 1, 4, window=window)


def expanded(index: AttentionIndex, heads: Heads) -> Tensor:
    """[B, H, N, N] bool: who reads whom."""
    batch, many, tokens = heads.queries.shape[:3]
    ends = [tokens] * batch if heads.lengths is None else heads.lengths.tolist()
    found = torch.zeros(batch, many, tokens, tokens, dtype=torch.bool)
    for b, end in enumerate(ends):
        for h in range(many):
            s = {"layer": 0, "kv": h // heads.group, "query": h}[index.share]
            moved = index.permutation
            order = range(tokens) if moved is None else moved[b, h // heads.group].tolist()
            for i in range(end):
                keys = set(range(index.sink)) | set(range(i - index.local + 1, i + index.local))
                if i < index.first or i >= end - index.last:
                    keys = set(range(end))
                for part, width in ((index.tiles, index.width), (index.columns, 1)):
                    if part is not None:
                        starts = part[b % part.shape[0], s, i // index.rows].tolist()
                        places = {start + n for start in starts if start >= 0 for n in range(width)}
                        keys |= {order[place] for place in places if place < tokens}
                keys = {j for j in keys if 0 <= j < end and (j <= i or not heads.causal)}
                found[b, h, i, [j for j in keys if abs(i - j) < (heads.window or tokens)]] = True
    return found


def weights(heads: Heads, mask: Tensor | None = None) -> Tensor:
    """Attention [B, H, N, N] in float64, over the pairs of a mask; rows without any are 0."""
    keys = heads.keys.double().repeat_interleave(heads.group, 1)
    logits = heads.queries.double() @ keys.transpose(2, 3) * heads.scale
    seen = torch.ones(logits.shape[-2:], dtype=torch.bool)
    seen = (seen.tril() if heads.causal else seen).expand(logits.shape)
    if heads.window:
        seen = (
            seen & seen.new_ones(seen.shape).triu(1 - heads.window) & seen.new_ones(seen.shape).tril(heads.window - 1)
        )
    if heads.lengths is not None:
        seen = seen & (torch.arange(logits.shape[-1]) < heads.lengths.reshape(-1, 1, 1, 1))
    seen = seen if mask is None else seen & mask
    return torch.where(seen, logits, -torch.inf).softmax(-1).nan_to_num(0.0)


def attended(heads: Heads, mask: Tensor | None = None) -> Tensor:
    """Attention's result in float64, over the pairs of a mask."""
    return weights(heads, mask) @ heads.values.double().repeat_interleave(heads.group, 1)


def recall(heads: Heads, mask: Tensor) -> Tensor:
    """[B, H, N] part of dense attention that the pairs of a mask hold."""
    return (weights(heads) * mask).sum(-1)
