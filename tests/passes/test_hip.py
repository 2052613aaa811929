"""HiP: the worked example of its card, its descent written out key by key, and what probing costs in recall."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sparse_oracle import drawn, expanded, fixture, recall

from tamis.attention_index import AttentionIndex, Heads
from tamis.errors import BadParameter
from tamis.passes.methods.hip import HiP
from tamis.rewrite import build_pass


def test_the_card_s_example() -> None:
    """The last row of queries; every chunk's best key is reached by probing."""
    heads, method = fixture(), HiP(sink=2, local=4, chunks=4, keeps=4, strides=1, block=4)
    found = method.scores(heads, torch.tensor([2, 6, 10])[None, None, None], 4, 1)[0, 0, 3]
    torch.testing.assert_close(found, torch.tensor([8.1786, 11.375, 8.0]).double(), atol=1e-4, rtol=0)
    products = (heads.queries[:, :1] @ heads.keys.transpose(2, 3))[0, 0, 12:]
    best = torch.stack([products[:, part].max() for part in (slice(2, 6), slice(6, 10), slice(10, 12))])
    torch.testing.assert_close(found, best)
    tiles = method.index(heads).tiles
    assert tiles is not None
    assert tiles[0, 0].tolist() == [[-1], [2], [6], [6]]


def descent(heads: Heads, b: int, h: int, row: int, start: int, size: int, method: HiP, stride: int) -> float:
    """The score of one chunk for one head, a step at a time."""
    tokens = heads.tokens if heads.lengths is None else int(heads.lengths[b])
    end = min((row + 1) * method.block, tokens) - method.local
    asked = [i for i in range(row * method.block, (row + 1) * method.block, stride) if i < tokens]

    def product(key: int) -> float:
        k = heads.keys[b, h // heads.group, key].double()
        return max((float(heads.queries[b, h, i].double() @ k) for i in asked if key <= i), default=-torch.inf)

    left, right, score = start, min(start + size, end), -torch.inf
    if right - left == 1:
        return product(left)
    while right - left > 1:
        middle = (left + right) // 2
        first, second = product((left + middle) // 2), product((middle + right) // 2)
        score = max(score, first, second)
        left, right = (left, middle) if first >= second else (middle, right)
    return score


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_scores_equal_a_descent_by_hand(chunk: int) -> None:
    heads = drawn(3, 61, lengths=[61, 43], size=8)
    method = HiP(sink=3, local=6, chunks=chunk, keeps=8, strides=3, block=8)
    starts = torch.arange(3, 61, chunk)[None, None, None]
    got = method.scores(heads, starts, chunk, 3)
    for row in (0, 2, 5, 7):
        for at, start in enumerate(starts.flatten().tolist()):
            if start < min((row + 1) * 8, 43) - 6 and row * 8 < 43:
                expected = descent(heads, 1, 2, row, start, chunk, method, 3)
                assert got[1, 2, row, at].item() == pytest.approx(max(expected, torch.finfo().min), rel=1e-5)


def stages_by_hand(heads: Heads, h: int, row: int, method: HiP) -> list[int]:
    """Chunks left after the last stage, for one head of the first batch row."""
    end = min((row + 1) * method.block, heads.tokens) - method.local
    starts = list(range(method.sink, end, method.chunks[0]))
    before = method.chunks[0]
    for chunk, keep, stride in zip(method.chunks, method.keeps, method.strides, strict=True):
        starts = [s for start in starts for s in range(start, min(start + before, end), chunk)]
        ranked = sorted(starts, key=lambda s: (-descent(heads, 0, h, row, s, chunk, method, stride), s))
        starts, before = sorted(ranked[: keep // chunk]), chunk
    return starts


def test_stages_equal_those_by_hand() -> None:
    heads = drawn(4, 77, batch=1, size=8)
    method = HiP(sink=2, local=5, chunks=[16, 4, 2], keeps=[32, 16, 6], strides=[2, 2, 1], block=8)
    tiles = method.index(heads).tiles
    assert tiles is not None
    for row in (0, 3, 9):
        for h in range(4):
            assert [s for s in tiles[0, h, row].tolist() if s >= 0] == stages_by_hand(heads, h, row, method)


@pytest.mark.parametrize("share", ["kv", "layer"])
def test_a_shared_choice_is_what_the_best_query_wants(share: str) -> None:
    heads = drawn(5, 64, size=8)
    method = HiP(sink=2, local=4, chunks=4, keeps=8, strides=1, block=8, share=share)
    starts = torch.arange(2, 60, 4)[None, None, None]
    of_all = HiP(sink=2, local=4, chunks=1, keeps=8, strides=1, block=8)
    each = of_all.scores(heads, torch.arange(2, 60)[None, None, None], 1, 1)  # every key, for every head
    shared = each.reshape(2, {"kv": 2, "layer": 1}[share], -1, 8, 58).amax(2)
    got = method.scores(heads, starts, 4, 1)
    assert got.shape == (2, shared.shape[1], 8, 15)
    assert all((got[..., n] <= shared[..., 4 * n : 4 * n + 4].amax(-1) + 1e-4)[:, :, 7].all() for n in range(14))
    assert any(torch.allclose(got[:, :, 7, n], shared[:, :, 7, 4 * n : 4 * n + 4].amax(-1)) for n in range(14))


def test_recall_is_between_chance_and_the_best_chunks() -> None:
    heads = drawn(6, 160, size=8)
    method = HiP(sink=4, local=16, chunks=[32, 8], keeps=[64, 24], strides=[2, 1], block=16)
    index = method.index(heads)
    assert index.tiles is not None
    row = torch.arange(10).unsqueeze(1)
    starts = 4 + torch.arange(20) * 8
    room = (starts < row * 16).expand(2, 4, -1, -1)

    def recalled(scores: torch.Tensor) -> float:
        picked = torch.where(room, scores, -torch.inf).topk(3, -1)
        tiles = torch.where(picked.values > -torch.inf, starts[picked.indices], -1).int()
        other = AttentionIndex(16, 8, tiles, share="query", sink=4, local=16)
        return recall(heads, expanded(other, heads)).mean().item()

    exact = (heads.queries @ heads.keys.repeat_interleave(2, 1).transpose(2, 3))[..., 4:]
    exact = torch.nn.functional.pad(exact, (0, 4), value=-1e9).reshape(2, 4, 10, 16, 20, 8).amax((3, 5))
    chance = recalled(torch.rand(exact.shape, generator=torch.Generator().manual_seed(0)))
    found = recall(heads, expanded(index, heads)).mean().item()
    assert chance + 0.02 < found <= recalled(exact) + 0.01


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("chunks", {"chunks": [8, 3], "keeps": [8, 8], "strides": [1, 1]}),
        ("chunks", {"chunks": []}),
        ("keeps", {"keeps": [8, 8]}),
        ("keeps", {"keeps": [8, 8, 0]}),
        ("strides", {"strides": [1]}),
        ("strides", {"strides": "many"}),
        ("local", {"local": 0}),
        ("share", {"share": "all"}),
    ],
)
def test_wrong_parameters_are_said(name: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(BadParameter, match=name):
        build_pass("hip", parameters)
