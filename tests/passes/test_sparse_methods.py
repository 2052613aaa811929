"""The worked examples of the sparse attention methods' cards, and what is said of wrong parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sparse_oracle import attended, drawn, expanded, fixture, recall
from sparse_registry import small

from tamis.attention_index import Heads
from tamis.errors import BadParameter
from tamis.passes.methods.a_shape import AShape, TriShape
from tamis.passes.methods.block_sparse import BlockSparse, XAttention
from tamis.passes.methods.flex_prefill import FlexPrefill
from tamis.passes.methods.sparge import Sparge
from tamis.passes.methods.vertical_slash import VerticalSlash
from tamis.passes.sparse import SparseAttention
from tamis.rewrite import build_pass


def row15(method: SparseAttention, heads: Heads) -> list[float]:
    return [round(x, 4) for x in method.attend(heads)[0, 0, 15].tolist()]


def facts(method: SparseAttention) -> tuple[list[int], float, float]:
    """Pairs of each head, mean recall and smallest recall on the fixture."""
    heads = fixture()
    mask = expanded(method.index(heads), heads)
    found = recall(heads, mask)
    return mask.sum((0, 2, 3)).tolist(), round(found.mean().item(), 4), round(found.min().item(), 4)


def test_dense_example() -> None:
    assert [round(x, 4) for x in attended(fixture())[0, 0, 15].tolist()] == [0.7090, 1.4231, -0.0887, -1.2773]
    assert [round(x, 4) for x in attended(fixture())[0, 1, 15].tolist()] == [0.4317, 1.1423, 0.4840, -1.5182]


def test_a_shape_example() -> None:
    method = AShape(sink=2, local=4)
    assert facts(method)[:2] == ([81, 81], 0.7062)
    assert row15(method, fixture()) == [0.3254, 1.0397, 1.7540, -1.6542]


def test_tri_shape_example() -> None:
    method = TriShape(sink=2, local=4, last=3)
    assert facts(method)[0] == [108, 108]
    assert row15(method, fixture()) == [0.7090, 1.4231, -0.0887, -1.2773]


class TwoTiles(BlockSparse):
    keep = [0, 2, 1]  # noqa: RUF012  (the published budget is a number of tiles)


class ThreeTiles(BlockSparse):
    keep = [0, 3, 1]  # noqa: RUF012


def test_block_sparse_example() -> None:
    method = TwoTiles(block=4, sink=False, diagonal=False)
    assert facts(method)[1:] == (0.8720, 0.2873)
    tiles = method.index(fixture()).tiles
    assert tiles is not None
    assert tiles[0, 0].tolist() == [[0, -1], [0, 4], [0, 4], [4, 12]]
    assert facts(ThreeTiles(block=4))[1:] == (0.9569, 0.6119)


def test_vertical_slash_example() -> None:
    index = VerticalSlash(columns=4, slashes=4, sink=1, near=2, estimate=4, block=4).index(fixture())
    assert index.tiles is not None
    assert index.columns is not None
    assert index.tiles[0, 0].tolist() == [[0, -1, -1, -1], [3, 7, -1, -1], [0, 7, 11, -1], [3, 7, 11, 15]]
    assert [[c for c in row if c >= 0] for row in index.columns[0, 0].tolist()] == [[], [0], [], [0]]


def test_x_attention_example() -> None:
    method = XAttention(density=1.0, block=4, stride=2, threshold=0.8)
    rows = method.scores(fixture())[0, 0]
    assert [round(x, 4) for x in rows[3].tolist()] == [0.1367, 0.6775, 0.1440, 1.0417]
    torch.testing.assert_close(rows.sum(1), torch.full((4,), 2.0))
    tiles = method.index(fixture()).tiles
    assert tiles is not None
    assert [t for t in tiles[0, 0, 3].tolist() if t >= 0] == [0, 4, 12]
    assert facts(method)[1] == 0.9833


def test_flex_prefill_example() -> None:
    assert facts(FlexPrefill(block=4, gamma=0.8, min_budget=4, tau=0.1))[:2] == ([120, 136], 0.9833)


def test_random_tiles_are_another_draw_for_each_head_layer_and_seed() -> None:
    heads = drawn(13, 128)
    method = small("random-tiles", share="query")
    tiles = method.index(heads).tiles
    others = replace(method, seed=1).index(heads).tiles, method.index(replace(heads, layer=2)).tiles
    assert all(not torch.equal(tiles, other) for other in (*others, tiles.flip(1)))
    assert torch.equal(tiles, method.index(replace(heads, queries=heads.queries + 1)).tiles)
    assert ((tiles == 0).any(-1) & (tiles == 8 * torch.arange(16).reshape(1, 1, 16, 1)).any(-1)).all()


def test_a_divergence_with_zeros_is_a_number() -> None:
    """Peaked heads have pooled attention of exactly 0, for which 0 log 0 must be 0."""
    heads = fixture()
    peaked = replace(heads, keys=heads.keys * 1e4)
    own = FlexPrefill(block=4, gamma=0.8, min_budget=4, tau=1.0)
    assert torch.equal(own.index(peaked).tiles, own.index(peaked).tiles)  # type: ignore[arg-type]
    assert facts(replace(own, tau=1.0))[0] != facts(replace(own, tau=0.0))[0]


def test_sparge_example() -> None:
    published = Sparge(block=4, threshold=0.9, similarity=0.1, sink=False, diagonal=False, crossing=False)
    tiles = published.index(fixture()).tiles
    assert tiles is not None
    assert [t for t in tiles[0, 0, 3].tolist() if t >= 0] == [4]
    assert [t for t in tiles[0, 1, 3].tolist() if t >= 0] == [0, 4, 8, 12]
    assert facts(published)[2] == 0.1333


def test_a_cap_takes_the_best_of_mixed_tiles() -> None:
    """All tiles mixed, of which a third may be read: those of highest pooled score, not those of lowest index."""
    heads = drawn(14, 120)
    centred = replace(heads, keys=heads.keys - heads.keys.mean(2, keepdim=True))
    for similarity in (1.0, -1.0):
        tiles = Sparge(block=8, density=0.3, similarity=similarity, threshold=1.0).index(heads).tiles
        assert torch.equal(tiles, BlockSparse(block=8, density=0.3).index(centred).tiles)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("block-sparse", {"density": 0}),
        ("block-sparse", {"density": 1.5}),
        ("block-sparse", {"block": 0}),
        ("block-sparse", {"share": "heads"}),
        ("a-shape", {"local": 0}),
        ("vertical-slash", {"estimate": 0}),
        ("x-attention", {"block": 64, "stride": 7}),
        ("flex-prefill", {"gamma": 0}),
        ("a-shape", {"layers": "all"}),
    ],
)
def test_wrong_parameters_are_said(name: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(BadParameter, match=next(iter(parameters if len(parameters) == 1 else ["stride"]))):
        build_pass(name, parameters)
