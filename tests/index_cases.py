"""Random indices of block_sparse_attention, and who reads whom by its definition, pair by pair."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


def pairs(
    tokens: int,
    length: int,
    tiles: Any,
    columns: Any,
    rows: int,
    width: int,
    sink: int,
    local: int,
    first: int,
    last: int,
    causal: bool,
    p: list[int],
    window: int = 0,
) -> list[set[int]]:
    """Which places in memory each query of one head reads, from the sentences of the op's definition."""
    found = []
    for i in range(tokens):
        some = {j for j in range(tokens) if p[j] < sink or abs(i - p[j]) < local}
        if tiles is not None:
            some |= {int(start) + n for start in tiles[i // rows] if start >= 0 for n in range(width)}
        if columns is not None:
            some |= {int(c) for c in columns[i // rows] if c >= 0}
        if length - last <= i or i < first:
            some = set(range(tokens))
        read = {j for j in some if j < tokens and p[j] < length and (not causal or p[j] <= i)}
        read = {j for j in read if not window or abs(i - p[j]) < window}
        found.append(read if i < length else set())
    return found


def dense(q: Tensor, k: Tensor, v: Tensor, sets: Any, scale: float, softcap: float | None) -> Tensor:
    """Attention of each query to its set, one at a time, in float64."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i, some in enumerate(sets[b][h]):
                if not some:
                    continue
                keys = sorted(some)
                logits = scale * (k[b, h // group, keys].double() @ q[b, h, i].double())
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                out[b, h, i] = logits.softmax(0) @ v[b, h // group, keys].double()
    return out


def drawn_index(generator: Any, batch: int, scope: int, tokens: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Tiles at any offset that do not overlap, and columns outside them."""
    count, most = math.ceil(tokens / rows), math.ceil(tokens / width)
    tiles = torch.full((batch, scope, count, most), -1, dtype=torch.int32)
    columns = torch.full((batch, scope, count, 3), -1, dtype=torch.int32)
    for b in range(batch):
        for s in range(scope):
            for r in range(count):
                at, t, free = 0, 0, set(range(tokens))
                while True:
                    at += int(torch.randint(0, 2 * width, (), generator=generator))
                    if at >= tokens or t == most:
                        break
                    tiles[b, s, r, t] = at
                    free -= set(range(at, at + width))
                    at, t = at + width, t + 1
                for c, j in enumerate(sorted(free)[:: max(1, len(free) // 3)][:3]):
                    columns[b, s, r, c] = j
    return tiles, columns


@dataclass(frozen=True)
class Case:
    """Arguments of the op, and the places that its definition has each query read, by batch row, head and query."""

    q: Tensor
    k: Tensor
    v: Tensor
    index: tuple[Any, ...]
    sets: list[list[list[set[int]]]]
    scale: float
    softcap: float | None
    window: int

    @property
    def args(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, *self.index, self.softcap, self.window


def drawn_case(seed: int, size: int = 8, scale: float = 0.4) -> Case:
    """A random index; every second one with padding, some over keys in another order or with a window."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    tokens, rows, width = draw(1, 23), draw(1, 6), draw(1, 5)
    heads, group = draw(1, 2), draw(1, 3)
    share = ("layer", "kv", "query")[seed % 3]
    scope = {"layer": 1, "kv": heads, "query": heads * group}[share]
    q = torch.randn(2, heads * group, tokens, size, generator=generator)
    k, v = (torch.randn(2, heads, tokens, size, generator=generator) for _ in range(2))
    tiles, columns = drawn_index(generator, 2, scope, tokens, rows, width)
    lengths = torch.tensor([tokens, draw(1, tokens)]) if seed % 2 else None
    sink, local, causal = draw(0, 3), draw(0, 4), seed % 5 != 0
    first, last = (draw(0, 3), draw(0, 3)) if seed % 4 == 0 else (0, 0)
    softcap = 1.3 if seed % 6 == 0 else None
    order = torch.rand(2, heads, tokens, generator=generator).argsort(-1).to(torch.int32)
    positions = order if seed // 2 % 3 == 0 else None
    window = draw(1, 7) if seed % 7 in (1, 4, 6) else 0
    sets = [
        [
            pairs(
                tokens, tokens if lengths is None else int(lengths[b]), tiles[b, of], columns[b, of], rows, width, sink,
                local, first, last, causal,
                list(range(tokens)) if positions is None else positions[b, h // group].tolist(), window,
            )
            for h in range(heads * group)
            for of in [{"layer": 0, "kv": h // group, "query": h}[share]]
        ]
        for b in range(2)
    ]  # fmt: skip
    index = (tiles, columns, positions, lengths, share, rows, width, sink, local, first, last, scale, causal)
    return Case(q, k, v, index, sets, scale, softcap, window)


def narrow_case(size: int, dtype: torch.dtype = torch.float32) -> tuple[Case, Tensor]:
    """Heads narrower than what a kernel multiplies at once, under the scale of their own size; what comes out."""
    case = drawn_case(7, size, size**-0.5)
    case = replace(case, q=case.q.to(dtype), k=case.k.to(dtype), v=case.v.to(dtype))
    expected = dense(case.q, case.k, case.v, case.sets, size**-0.5, case.softcap)
    assert not torch.allclose(expected, dense(case.q, case.k, case.v, case.sets, 128**-0.5, case.softcap), atol=1e-2)
    return case, expected
