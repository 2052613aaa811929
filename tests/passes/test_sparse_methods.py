"""What holds of every sparse attention method, and the worked examples of their cards."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from sparse_oracle import attended, drawn, expanded, fixture, recall, weights
from torch import Tensor

from tamis.attention_index import AttentionIndex, Heads
from tamis.errors import BadParameter
from tamis.passes.methods.a_shape import AShape, TriShape
from tamis.passes.methods.block_sparse import BlockSparse, XAttention
from tamis.passes.methods.flex_prefill import FlexPrefill
from tamis.passes.methods.sparge import Sparge
from tamis.passes.methods.vertical_slash import VerticalSlash
from tamis.passes.sparse import SparseAttention
from tamis.registry import origin_of, registered_passes
from tamis.rewrite import build_pass

SMALL: dict[str, dict[str, Any]] = {  # budgets that leave much out of a hundred tokens
    "a-shape": {"sink": 3, "local": 9},
    "bigbird": {"block": 8, "random": 1},
    "block-sparse": {"density": 0.3, "block": 8},
    "cca": {"span": 4, "local": 6},
    "combiner": {"span": 4},
    "dilated": {"step": 3, "local": 4, "sink": 2, "first": 1},
    "flex-prefill": {"block": 8, "min_budget": 8, "gamma": 0.6, "tau": 0.3},
    "hip": {"sink": 3, "local": 9, "chunks": [8, 4], "keeps": [40, 16], "strides": [2, 1], "block": 8},
    "landmark": {"mem_freq": 4, "top_k": 3},
    "infllm": {"sink": 3, "local": 8, "blocks": 2, "block": 6, "stand_ins": 2, "chunk": 4},
    "lm-infinite": {"sink": 3, "local": 9},
    "longformer": {"window": 12, "first": 2},
    "pbs": {"density": 0.5, "block": 8, "segment": 16, "threshold": 0.4},
    "random-tiles": {"density": 0.3, "block": 8, "share": "layer"},  # a draw of its own goes by the head's place
    "routing": {"clusters": 6, "window": 12},
    "sparge": {"block": 8, "threshold": 0.7, "similarity": 0.05, "density": 0.5},
    "streaming-llm": {"local": 12},
    "tri-shape": {"sink": 3, "local": 9, "last": 5},
    "vertical-slash": {"columns": 8, "slashes": 6, "sink": 2, "near": 3, "estimate": 8, "block": 8},
    "x-attention": {"density": 0.4, "block": 8, "stride": 4},
}


@cache
def methods() -> dict[str, type[SparseAttention]]:
    known = registered_passes().items()
    return {name: cls for name, cls in known if issubclass(cls, SparseAttention) and origin_of(cls) == "tamis"}


def small(name: str, **more: Any) -> Any:
    return build_pass(name, {**SMALL[name], **more})


every_method = pytest.mark.parametrize("name", SMALL)
every_index = pytest.mark.parametrize("name", [name for name in SMALL if methods()[name].indexed])


def test_every_method_has_a_small_budget() -> None:
    assert SMALL.keys() == methods().keys()


@every_method
@pytest.mark.parametrize(
    ("tokens", "group", "size"), [(1, 1, 64), (63, 4, 80), (64, 1, 96), (65, 2, 128), (129, 4, 16)]
)
def test_a_full_budget_is_dense_attention(name: str, tokens: int, group: int, size: int) -> None:
    heads = drawn(tokens, tokens, group=group, size=size)
    got = methods()[name].full(tokens).attend(heads)
    torch.testing.assert_close(got.double(), attended(heads), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["block-sparse", "vertical-slash", "x-attention"])
def test_a_full_budget_is_dense_attention_over_a_thousand_tokens(name: str) -> None:
    heads = drawn(0, 1000, batch=1, kv=1, group=2, size=8)
    got = methods()[name].full(1000).attend(heads)
    torch.testing.assert_close(got.double(), attended(heads), rtol=1e-5, atol=1e-5)


@every_index
@pytest.mark.parametrize("lengths", [None, [101, 60]])
def test_attention_is_over_the_pairs_of_the_index_and_no_others(name: str, lengths: list[int] | None) -> None:
    heads, method = drawn(5, 101, lengths=lengths), small(name)
    mask = expanded(method.index(heads), heads)
    got = method.attend(heads)
    torch.testing.assert_close(got.double(), attended(heads, mask), rtol=1e-5, atol=1e-5)
    most = torch.ones(101, 101).tril().sum() * mask.shape[0] * mask.shape[1]
    assert mask.sum() < 0.8 * most, "the budget is small"
    ends = lengths or [101, 101]
    for b, end in enumerate(ends):
        places = torch.arange(end)
        assert mask[b, :, places, places].all(), "every token reads itself"


@every_index
def test_lists_name_no_key_twice(name: str) -> None:
    index = small(name).index(drawn(6, 101, lengths=[101, 77]))
    if index.tiles is None:
        return
    starts = index.tiles.long()
    used = starts >= 0
    assert ((starts[..., 1:] - starts[..., :-1] >= index.width) | ~used[..., 1:]).all(), "ascending, no overlap"
    assert (used[..., :-1] | ~used[..., 1:]).all(), "unused ones are last"
    if index.columns is not None:
        keys, each = index.columns.long().unsqueeze(-1), starts.unsqueeze(-2)
        assert not ((each >= 0) & (keys >= each) & (keys < each + index.width)).any(), "no column is in a tile"


@every_method
def test_padding_changes_nothing(name: str) -> None:
    """A row of 60 tokens gives the same alone as beside a longer one."""
    heads = drawn(7, 101, lengths=[101, 60])
    alone = replace(
        heads,
        **{part: getattr(heads, part)[1:, :, :60] for part in ("queries", "keys", "values")},
        lengths=None,
    )
    together = small(name).attend(heads)[1:, :, :60]
    torch.testing.assert_close(together, small(name).attend(alone), rtol=1e-5, atol=1e-5)


@every_method
def test_rows_and_heads_do_not_depend_on_each_other(name: str) -> None:
    heads, method = drawn(8, 70), small(name)
    parts = {part: getattr(heads, part).flip(0, 1) for part in ("queries", "keys", "values")}
    flipped = method.attend(replace(heads, **parts)).flip(0, 1)
    torch.testing.assert_close(flipped, method.attend(heads), rtol=1e-5, atol=1e-5)


@every_method
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_tokens_give_numbers(name: str, value: float) -> None:
    heads = drawn(9, 50)
    same = replace(heads, queries=torch.full_like(heads.queries, value), keys=torch.full_like(heads.keys, value))
    method = small(name)
    got = method.attend(same)
    assert got.isfinite().all()
    if method.indexed:
        mask = expanded(method.index(same), same)
        torch.testing.assert_close(got.double(), attended(same, mask), rtol=1e-5, atol=1e-5)


@every_index
def test_whoever_chooses_can_share(name: str) -> None:
    """A method without the parameter has one list for all heads, which none can choose from its own scores."""
    method = small(name)
    if not hasattr(method, "share"):
        heads = drawn(10, 90)
        index = method.index(heads)
        assert index.share == "layer"
        other = method.index(replace(heads, queries=heads.queries.flip(1)))
        assert index.tiles is None or torch.equal(index.tiles, other.tiles)


@pytest.mark.parametrize("share", ["layer", "kv", "query"])
@pytest.mark.parametrize("name", [name for name in SMALL if hasattr(methods()[name], "share")])
def test_a_shared_choice_is_one(name: str, share: str) -> None:
    heads = drawn(10, 90)
    index = small(name, share=share).index(heads)
    assert index.share == share
    assert index.tiles is not None
    assert index.tiles.shape[1] == {"layer": 1, "kv": 2, "query": 4}[share]


@pytest.mark.parametrize("name", ["block-sparse", "x-attention", "vertical-slash", "a-shape"])
def test_more_budget_never_loses_attention(name: str) -> None:
    heads = drawn(11, 96)
    knob, values = {
        "block-sparse": ("density", [0.1, 0.3, 0.6, 1.0]),
        "x-attention": ("threshold", [0.0, 0.3, 0.6, 0.9]),
        "vertical-slash": ("slashes", [3, 6, 12, 24]),
        "a-shape": ("local", [2, 8, 32, 96]),
    }[name]
    more = {"density": 1.0} if name == "x-attention" else {}
    kept = [recall(heads, expanded(small(name, **more, **{knob: v}).index(heads), heads)) for v in values]
    if name == "vertical-slash":  # its tiles hold more than was chosen, which depends on how they lie
        kept = [one.mean() for one in kept]
    assert all((b >= a - 1e-12).all() for a, b in pairwise(kept))
    assert kept[-1].mean() > kept[0].mean()


def test_the_estimate_beats_chance_and_not_the_best_choice() -> None:
    """Recall lies between that of random tiles and that of the tiles with most true attention."""
    heads = drawn(12, 128, size=8)
    method = BlockSparse(density=0.3, block=8)
    mass = weights(heads).reshape(2, 4, 16, 8, 16, 8).sum((3, 5)).float()

    def recalled(scores: Tensor) -> float:
        tiles = torch.ops.tamis.pick_tiles(scores, None, 8, True, True, True, method.keep, 1.0)
        index = AttentionIndex(8, 8, tiles, share="query")
        return recall(heads, expanded(index, heads)).mean().item()

    chance = recalled(torch.rand(mass.shape, generator=torch.Generator().manual_seed(0)))
    assert chance < recalled(method.scores(heads)) <= recalled(mass)


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
