"""What holds of every sparse attention method: T1 to T16 of the cards' test matrix (methods, llm part 7).

T9 and T12 are of methods that evict or page, except for permutations, which are here.  T14 is in
tests/kernels/test_block_sparse_attention.py and, for the kernel, tests/interpreter/test_attention.py.  T15 for each op
is in tests/kernels/test_every_op.py and tests/interpreter, for each method in test_sparse_traces.py, as is T16.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from sparse_oracle import attended, drawn, expanded, recall, weights
from sparse_registry import SMALL, every_index, every_method, methods, small
from torch import Tensor

from tamis.attention_index import AttentionIndex, Heads
from tamis.passes.methods.block_sparse import BlockSparse
from tamis.passes.sparse import arguments


def test_every_method_has_a_small_budget() -> None:
    assert SMALL.keys() == methods().keys()


@every_method
@pytest.mark.parametrize(
    ("tokens", "group", "size"), [(1, 1, 64), (63, 4, 80), (64, 1, 96), (65, 2, 128), (129, 4, 16)]
)
def test_a_full_budget_is_dense_attention(name: str, tokens: int, group: int, size: int) -> None:
    """T1."""
    full_is_dense(name, drawn(tokens, tokens, group=group, size=size))


@pytest.mark.parametrize("name", ["block-sparse", "vertical-slash", "x-attention"])
def test_a_full_budget_is_dense_attention_over_a_thousand_tokens(name: str) -> None:
    """T1."""
    full_is_dense(name, drawn(0, 1000, batch=1, kv=1, group=2, size=8))


@pytest.mark.full
@every_method
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 1000])
def test_a_full_budget_is_dense_attention_everywhere(name: str, tokens: int) -> None:
    """T1, the whole matrix."""
    for group in (1, 4, 8):
        for size in (64, 80, 96, 128):
            full_is_dense(name, drawn(tokens, tokens, batch=1, kv=1, group=group, size=size))


def full_is_dense(name: str, heads: Heads) -> None:
    got = methods()[name].full(heads.tokens).attend(heads)
    expected = attended(heads)
    if heads.lengths is not None:
        expected = expected * (torch.arange(heads.tokens) < heads.lengths.unsqueeze(1))[:, None, :, None]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_method
def test_a_full_budget_is_dense_attention_in_half_types(name: str, dtype: torch.dtype) -> None:
    """T1, to 2e-2."""
    heads = drawn(3, 65, group=4)
    half = replace(heads, **{part: getattr(heads, part).to(dtype) for part in ("queries", "keys", "values")})
    got = methods()[name].full(65).attend(half)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), attended(half), rtol=2e-2, atol=2e-2)


@every_index
@pytest.mark.parametrize("lengths", [None, [101, 60]])
def test_attention_is_over_the_pairs_of_the_index_and_no_others(name: str, lengths: list[int] | None) -> None:
    """T2, T4."""
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


@every_method
def test_later_keys_change_nothing_under_a_frozen_index(name: str) -> None:
    """T3.  Methods that choose by the last queries look ahead when they choose, never when they attend."""
    heads, method, after = drawn(13, 90), small(name), 41
    if not method.indexed and method.looks_ahead:
        pytest.skip(f"{name} says that it looks ahead, and has no index to freeze")
    later = (torch.arange(90) > after)[:, None]
    changed = replace(heads, keys=torch.where(later, 3 - heads.keys, heads.keys), values=heads.values + 5 * later)
    attend: Any = method.attend
    if method.indexed:
        index = method.index(heads)
        attend = lambda seen: torch.ops.tamis.block_sparse_attention(*arguments(index, seen))  # noqa: E731
    before, now = attend(heads), attend(changed)
    torch.testing.assert_close(now[:, :, : after + 1], before[:, :, : after + 1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(now[:, :, after + 1 :], before[:, :, after + 1 :])


@pytest.mark.parametrize("name", [name for name in SMALL if hasattr(methods()[name], "density")])
def test_forced_tiles_are_read_at_the_least_budget(name: str) -> None:
    """T4: the first tile and the row's own, however small the density."""
    heads, method = drawn(14, 96), small(name, density=1e-6)
    mask = expanded(method.index(heads), heads)
    place = torch.arange(96)
    own = (place.unsqueeze(1) // 8 == place // 8) & (place <= place.unsqueeze(1))
    assert (mask | ~own).all(), "the row's own tile"
    assert mask[:, :, :, 0].all(), "the first token"


@every_method
def test_weights_add_up_to_one_and_heads_read_their_own_keys(name: str) -> None:
    """T5: no key counts twice.  T13: values that are their key head's number come out as that of each query head."""
    heads = drawn(16, 70, kv=3, group=4, lengths=[70, 41])
    number = torch.arange(3.0)[None, :, None, None].expand(heads.values.shape)
    got = small(name).attend(replace(heads, values=number + 1))
    expected = (torch.arange(12) // 4 + 1.0)[None, :, None, None].expand(got.shape)
    real = (torch.arange(70) < torch.tensor([[70], [41]]))[:, None, :, None].expand(got.shape)
    read = real & (got != 0)
    torch.testing.assert_close(got[read], expected[read], rtol=1e-5, atol=1e-5)
    assert torch.equal(read, real) or (name == "routing" and read.sum() > 0.5 * real.sum()), "in no cluster: 0"


@every_index
def test_recall_is_at_most_that_of_the_best_keys(name: str, record_property: Any) -> None:
    """T8: no choice of as many keys holds more than those of most attention; the ratio is in the report."""
    heads = drawn(17, 120)
    mask = expanded(small(name).index(heads), heads)
    dense = weights(heads)
    best = dense.sort(-1, descending=True).values.cumsum(-1).gather(-1, mask.sum(-1, keepdim=True) - 1).squeeze(-1)
    got = recall(heads, mask)
    ratio = (got.mean() / best.mean()).item()
    record_property("recall", round(got.mean().item(), 4))
    record_property("recall_of_best", round(ratio, 4))
    most = (got / best).max().item()
    assert most <= 1 + 1e-9, f"{name} finds {most:.6f} of what the best keys of a query hold, {ratio:.4f} on average"


@every_index
def test_keys_in_another_order_are_a_permutation(name: str) -> None:
    """T9: every token is at one place of each key head, padding behind."""
    heads = drawn(18, 61, lengths=[61, 40])
    order = small(name).index(heads).permutation
    if order is None:
        return
    assert torch.equal(order.long().sort(-1).values, torch.arange(61).expand(order.shape))
    assert (order[1, :, :40] < 40).all()


@pytest.mark.parametrize("name", [name for name in SMALL if hasattr(methods()[name], "threshold")])
def test_thresholds_of_none_and_of_more_than_all(name: str) -> None:
    """T10: 1 and more reads everything that the density lets; 0 still reads what is forced."""
    heads = drawn(19, 75)
    for threshold in (1.0, 1.0000001):
        got = small(name, threshold=threshold, density=1.0).attend(heads)
        torch.testing.assert_close(got.double(), attended(heads), rtol=1e-5, atol=1e-5)
    mask = expanded(small(name, threshold=0.0, density=1.0).index(heads), heads)
    place = torch.arange(75)
    assert mask[:, :, place, place].all()
    assert mask.sum() < 0.9 * expanded(small(name, threshold=1.0, density=1.0).index(heads), heads).sum()


@every_index
def test_lists_name_no_key_twice(name: str) -> None:
    """T5."""
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
    """T6: a row of 60 tokens gives the same alone as beside a longer one."""
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
    """T11."""
    heads, method = drawn(8, 70), small(name)
    parts = {part: getattr(heads, part).flip(0, 1) for part in ("queries", "keys", "values")}
    flipped = method.attend(replace(heads, **parts)).flip(0, 1)
    torch.testing.assert_close(flipped, method.attend(heads), rtol=1e-5, atol=1e-5)


@every_method
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_tokens_give_numbers(name: str, value: float) -> None:
    """T10: ties, zero vectors."""
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
    """T7."""
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
    """T8: recall lies between that of random tiles and that of the tiles with most true attention."""
    heads = drawn(12, 128, size=8)
    method = BlockSparse(density=0.3, block=8)
    mass = weights(heads).reshape(2, 4, 16, 8, 16, 8).sum((3, 5)).float()

    def recalled(scores: Tensor) -> float:
        tiles = torch.ops.tamis.pick_tiles(scores, None, 8, True, True, True, method.keep, 1.0)
        index = AttentionIndex(8, 8, tiles, share="query")
        return recall(heads, expanded(index, heads)).mean().item()

    chance = recalled(torch.rand(mass.shape, generator=torch.Generator().manual_seed(0)))
    assert chance < recalled(method.scores(heads)) <= recalled(mass)
