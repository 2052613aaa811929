"""Attention over an index against a mask written out pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from index_cases import dense, drawn_case, narrow_case

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.op import OPS

called = torch.ops.tamis.block_sparse_attention  # on a CPU, row after row
inlined = OPS["block_sparse_attention"].reference  # what is compiled: all keys gathered
both = pytest.mark.parametrize("attend", [called, inlined], ids=["called", "inlined"])


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
@pytest.mark.parametrize("size", [80, 96])
def test_heads_narrower_than_a_tile_keep_their_scale(size: int, attend: Any) -> None:
    """T14 of the cards' tests on a CPU."""
    case, expected = narrow_case(size)
    torch.testing.assert_close(attend(*case.args).double(), expected, rtol=1e-5, atol=1e-5)


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
@pytest.mark.parametrize("share", ["layer", "kv", "query"])
def test_an_index_may_name_nothing(share: str, attend: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(2, 4, 9, 8, generator=generator)
    k, v = (torch.randn(2, 2, 9, 8, generator=generator) for _ in range(2))
    assert not attend(q, k, v, None, None, None, None, share, 4, 1, 0, 0, 0, 0, 0.3, True).any()
    got = attend(q, k, v, None, None, None, torch.tensor([9, 5]), share, 4, 1, 0, 0, 0, 2, 0.3, True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)
    torch.testing.assert_close(got[0, :, 7:], expected[0, :, 7:])
    torch.testing.assert_close(got[1, :, 3:5], expected[1, :, 3:5])
    rest = torch.cat([got[0, :, :7], got[1, :, :3], got[1, :, 5:]], 1)
    assert not rest.any()


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
