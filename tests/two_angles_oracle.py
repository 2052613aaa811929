"""Attention with far keys at other positions, pair by pair, in place of a transformers model's own attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Far = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TwoPositions:
    """What a query at place i and a far key at place j stand at; `far` says which keys a query reads as far ones.

    local       keys nearer than this are read as the model has them
    far         of one row: (near attention [H, N, N], queries and keys [H, N, D] at far positions) -> [H, N, N] bool,
                which far keys are read
    reach       a query's position for far keys is that of its own place, but at most this
    at_origin   far keys stand at position 0, or at their own
    middle      the last `last` queries also read so many of the far keys left, those of highest logit with keys at
                position 0 and queries at `middle_at` or before
    """

    local: int
    far: Far
    reach: int
    at_origin: bool
    middle: int = 0
    middle_at: int = 0
    last: int = 1


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x [H, N, D] with its first channels turned by (cos, sin) [N, R], halves paired."""
    cos, sin = table
    turned, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, still], -1)


def unrotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """What gives x when rotated."""
    cos, sin = table
    length = (cos**2 + sin**2)[:, :1]
    turned = rotate(x, (cos, -sin))
    return torch.cat([turned[..., : cos.shape[-1]] / length, turned[..., cos.shape[-1] :]], -1)


def row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: tuple[Tensor, Tensor],
    how: TwoPositions,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """[H, N, D] in float64 for one row of real tokens; q and k rotated by `table`, keys repeated for every head.

    window  keys this far away and farther are not seen, whatever the method reads
    """
    q, k, v, cos, sin = (x.double() for x in (q, k, v, *table))
    table = cos, sin
    place = torch.arange(q.shape[1])
    moved = place.clamp(max=how.reach)
    raw = unrotate(q, table), unrotate(k, table)
    far_q = rotate(raw[0], (cos[moved], sin[moved]))
    far_k = rotate(raw[1], (cos[place * 0], sin[place * 0])) if how.at_origin else k
    distance = place.unsqueeze(1) - place
    logits = torch.where(distance < how.local, q @ k.transpose(1, 2), far_q @ far_k.transpose(1, 2)) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    near = (distance >= 0) & (distance < how.local)
    far = how.far(torch.where(near, logits, -torch.inf).softmax(-1), far_q, far_k) & (distance >= how.local)
    seen = (near | far) & (distance < (window or len(place)))
    at = place.clamp(max=how.middle_at)
    between = rotate(raw[0], (cos[at], sin[at])) @ rotate(raw[1], (cos[place * 0], sin[place * 0])).transpose(1, 2)
    between = between * scale if softcap is None else softcap * torch.tanh(between * scale / softcap)
    for h in range(len(q)):
        for i in range(max(0, len(place) - how.last), len(place)):
            left = [j for j in range(i - how.local + 1) if not far[h, i, j] and i - j < (window or len(place))]
            best = sorted(left, key=lambda j, row=between[h, i]: (-float(row[j]), j))[: how.middle]
            logits[h, i, best], seen[h, i, best] = between[h, i, best], True
    return torch.where(seen, logits, -torch.inf).softmax(-1) @ v


def sinks(count: int) -> Far:
    """The first keys."""
    return lambda near, q, k: (torch.arange(q.shape[1]) < count).expand(near.shape)


def remembered(sink: int, local: int, blocks: int, block: int, stand_ins: int, chunk: int) -> Far:
    """The first keys, those of the blocks that InfLLM looks up, and those that are in no block yet."""

    def far(near: Tensor, q: Tensor, k: Tensor) -> Tensor:
        heads, tokens = q.shape[:2]
        got, seen = near.sum(1).tolist(), torch.zeros(near.shape, dtype=torch.bool)
        for first in range(0, tokens, chunk):
            closed = [start for start in range(sink, tokens, block) if start + block <= first - local]

            def score(start: int, first: int = first) -> float:
                total = 0.0
                for h in range(heads):
                    best = sorted(range(start, start + block), key=lambda j: (-got[h][j], j))[:stand_ins]
                    total += float(q[h, first : first + chunk].mean(0) @ k[h, best].mean(0))
                return total

            chosen = sorted(closed, key=lambda start: (-score(start), start))[:blocks]
            rows = seen[:, first : first + chunk]
            rows[..., :sink] = True
            rows[..., closed[-1] + block if closed else sink :] = True
            for start in chosen:
                rows[..., start : start + block] = True
        return seen

    return far


@contextmanager
def attending(model: nn.Module, how: TwoPositions, mask: Tensor) -> Iterator[None]:
    """The model with this attention, for inputs with this mask [B, N] and positions that count real tokens."""
    from transformers import AttentionInterface

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, **rest: Any) -> Any:
        group = query.shape[1] // key.shape[1]
        out = torch.zeros_like(query)
        for b, real in enumerate(mask.bool()):
            table = model.model.rotary_emb(value, torch.arange(int(real.sum())).unsqueeze(0))
            rows = query[b, :, real], *(x[b, :, real].repeat_interleave(group, 0) for x in (key, value))
            limits = rest["scaling"], rest.get("softcap"), rest.get("sliding_window")
            out[b, :, real] = row_attention(*rows, (table[0][0], table[1][0]), how, *limits).to(out.dtype)
        return out.transpose(1, 2), None

    AttentionInterface.register("two-angles", attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("two-angles")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
