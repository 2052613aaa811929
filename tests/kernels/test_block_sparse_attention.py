"""Attention over an index against a mask written out pair by pair."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    p: list[int],
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

    @property
    def args(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, *self.index, self.softcap


def drawn_case(seed: int) -> Case:
    """A random index; every second one with padding, every third over keys in another order."""
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
    order = torch.rand(2, heads, tokens, generator=generator).argsort(-1).to(torch.int32)
    positions = order if seed // 2 % 3 == 0 else None
    sets = [
        [
            pairs(
                tokens, tokens if lengths is None else int(lengths[b]), tiles[b, of], columns[b, of], rows, width, sink,
                local, first, last, causal,
                list(range(tokens)) if positions is None else positions[b, h // group].tolist(),
            )
            for h in range(heads * group)
            for of in [{"layer": 0, "kv": h // group, "query": h}[share]]
        ]
        for b in range(2)
    ]  # fmt: skip
    index = (tiles, columns, positions, lengths, share, rows, width, sink, local, first, last, 0.4, causal)
    return Case(q, k, v, index, sets, 0.4, softcap)


every_case = pytest.mark.parametrize("seed", range(36))


@both
@every_case
def test_random_indices_equal_the_definition(seed: int, attend: Any) -> None:
    case = drawn_case(seed)
    expected = dense(case.q, case.k, case.v, case.sets, case.scale, case.softcap)
    torch.testing.assert_close(attend(*case.args).double(), expected, rtol=1e-5, atol=1e-5)
    ones = torch.ones_like(case.v)  # each key once: weights add up to 1 where anything is read
    sums = attend(case.q, case.k, ones, *case.args[3:])
    read = torch.tensor([[[bool(some) for some in head] for head in row] for row in case.sets]).unsqueeze(-1)
    torch.testing.assert_close(sums, read.expand_as(sums).float(), rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("causal", [True, False])
def test_keys_in_another_order_change_nothing(causal: bool, attend: Any) -> None:
    """Sinks, nearest keys and padding go by positions; tiles name places, so these hold everything or nothing."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, 2, 30, 8, generator=generator) for _ in range(3))
    order = torch.rand(2, 2, 30, generator=generator).argsort(-1)
    moved_k, moved_v = (x.gather(2, order.unsqueeze(-1).expand(x.shape)) for x in (k, v))
    lengths, tiles = torch.tensor([30, 17]), (torch.arange(8) * 4).expand(1, 1, 8, 8).int()
    for index, rest in ((None, (2, 3, 0, 1)), (tiles, (0, 0, 0, 0))):
        one = attend(q, k, v, index, None, None, lengths, "layer", 4, 4, *rest, 0.3, causal)
        other = attend(q, moved_k, moved_v, index, None, order, lengths, "layer", 4, 4, *rest, 0.3, causal)
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


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
        got = attend(q, k, v, index[0], None, None, None, "kv", 64, 64, *index[1:], 0, 0, 0.25, True)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@both
def test_head_h_reads_key_head_h_over_group(attend: Any) -> None:
    q, k = torch.zeros(1, 6, 5, 4), torch.zeros(1, 3, 5, 4)
    v = torch.arange(3.0).reshape(1, 3, 1, 1).expand(1, 3, 5, 4)
    got = attend(q, k, v, None, None, None, None, "layer", 2, 1, 1, 2, 0, 0, 1.0, True)
    assert got[0, :, :, 0].unique(dim=1).flatten().tolist() == [0, 0, 1, 1, 2, 2]


@both
@pytest.mark.parametrize("causal", [True, False])
def test_tokens_that_are_not_read_do_not_matter(causal: bool, attend: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 30, 8, generator=generator) for _ in range(3))
    lengths, tiles = torch.tensor([21]), torch.tensor([[4]] * 8).int().reshape(1, 1, 8, 1)
    rest = ("layer", 4, 4, 1, 3, 0, 0, 0.3, causal)
    before = attend(q, k, v, tiles, None, None, lengths, *rest)
    for x in (q, k, v):
        x[:, :, 21:] = torch.nan
    torch.testing.assert_close(attend(q, k, v, tiles, None, None, lengths, *rest)[:, :, :21], before[:, :, :21])
    later = k.clone()
    later[:, :, 15:] += 5
    moved = attend(q, later, v, tiles, None, None, lengths, *rest)
    assert torch.equal(moved[:, :, :15], before[:, :, :15]) == causal
