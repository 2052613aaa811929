"""Attention over an index against a mask written out pair by pair."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.op import OPS

called = torch.ops.tamis.block_sparse_attention  # on a CPU, row after row
inlined = OPS["block_sparse_attention"].reference  # what is compiled: all keys gathered
both = pytest.mark.parametrize("attend", [called, inlined], ids=["called", "inlined"])


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
) -> list[set[int]]:
    """Which keys each query of one head reads, from the sentences of the op's definition."""
    found = []
    for i in range(tokens):
        some = set(range(sink)) | {j for j in range(tokens) if abs(i - j) < local}
        if tiles is not None:
            some |= {int(start) + n for start in tiles[i // rows] if start >= 0 for n in range(width)}
        if columns is not None:
            some |= {int(c) for c in columns[i // rows] if c >= 0}
        if length - last <= i or i < first:
            some = set(range(tokens))
        found.append({j for j in some if j < length and (not causal or j <= i)} if i < length else set())
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


@both
@pytest.mark.parametrize("seed", range(24))
def test_random_indices_equal_the_definition(seed: int, attend: Any) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    tokens, rows, width = draw(1, 23), draw(1, 6), draw(1, 5)
    heads, group = draw(1, 2), draw(1, 3)
    share = ("layer", "kv", "query")[seed % 3]
    scope = {"layer": 1, "kv": heads, "query": heads * group}[share]
    q = torch.randn(2, heads * group, tokens, 8, generator=generator)
    k, v = (torch.randn(2, heads, tokens, 8, generator=generator) for _ in range(2))
    tiles, columns = drawn_index(generator, 2, scope, tokens, rows, width)
    lengths = torch.tensor([tokens, draw(1, tokens)]) if seed % 2 else None
    sink, local, causal = draw(0, 3), draw(0, 4), seed % 5 != 0
    first, last = (draw(0, 3), draw(0, 3)) if seed % 4 == 0 else (0, 0)
    softcap = 1.3 if seed % 6 == 0 else None
    got = attend(q, k, v, tiles, columns, lengths, share, rows, width, sink, local, first, last, 0.4, causal, softcap)
    sets = [
        [
            pairs(
                tokens, tokens if lengths is None else int(lengths[b]), tiles[b, of], columns[b, of], rows, width, sink,
                local, first, last, causal,
            )
            for h in range(heads * group)
            for of in [{"layer": 0, "kv": h // group, "query": h}[share]]
        ]
        for b in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(got.double(), dense(q, k, v, sets, 0.4, softcap), rtol=1e-5, atol=1e-5)
    weights = torch.ones_like(v)  # each key once: weights add up to 1 where anything is read
    sums = attend(
        q, k, weights, tiles, columns, lengths, share, rows, width, sink, local, first, last, 0.4, causal, softcap
    )
    read = torch.tensor([[[bool(some) for some in head] for head in row] for row in sets]).unsqueeze(-1)
    torch.testing.assert_close(sums, read.expand_as(sums).float(), rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 1000])
@pytest.mark.parametrize("group", [1, 4])
def test_a_full_index_is_dense_attention(tokens: int, group: int, attend: Any) -> None:
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(1, 2 * group, tokens, 16, generator=generator)
    k, v = (torch.randn(1, 2, tokens, 16, generator=generator) for _ in range(2))
    count = -(-tokens // 64)
    tiles = (torch.arange(count) * 64).expand(1, 2, count, count).int()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for index in ((tiles, 0, 0), (None, 0, tokens), (None, tokens, 0)):
        got = attend(q, k, v, index[0], None, None, "kv", 64, 64, *index[1:], 0, 0, 0.25, True)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@both
def test_head_h_reads_key_head_h_over_group(attend: Any) -> None:
    q, k = torch.zeros(1, 6, 5, 4), torch.zeros(1, 3, 5, 4)
    v = torch.arange(3.0).reshape(1, 3, 1, 1).expand(1, 3, 5, 4)
    got = attend(q, k, v, None, None, None, "layer", 2, 1, 1, 2, 0, 0, 1.0, True)
    assert got[0, :, :, 0].unique(dim=1).flatten().tolist() == [0, 0, 1, 1, 2, 2]


@both
@pytest.mark.parametrize("causal", [True, False])
def test_tokens_that_are_not_read_do_not_matter(causal: bool, attend: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 30, 8, generator=generator) for _ in range(3))
    lengths, tiles = torch.tensor([21]), torch.tensor([[4]] * 8).int().reshape(1, 1, 8, 1)
    rest = ("layer", 4, 4, 1, 3, 0, 0, 0.3, causal)
    before = attend(q, k, v, tiles, None, lengths, *rest)
    for x in (q, k, v):
        x[:, :, 21:] = torch.nan
    torch.testing.assert_close(attend(q, k, v, tiles, None, lengths, *rest)[:, :, :21], before[:, :, :21])
    later = k.clone()
    later[:, :, 15:] += 5
    moved = attend(q, later, v, tiles, None, lengths, *rest)
    assert torch.equal(moved[:, :, :15], before[:, :, :15]) == causal
