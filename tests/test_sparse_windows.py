"""Sparse attention methods in layers with a window of the model's own: they read, and choose from, what it shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparse_oracle import attended, drawn, expanded
from sparse_registry import SMALL, methods, small
from test_sparse_suite import full_is_dense
from torch import Tensor

from tamis.attention_index import AttentionIndex, Heads
from tamis.passes.methods.hip import HiP
from tamis.passes.methods.pbs import PBS

TAKES = [name for name in SMALL if methods()[name].takes_windows()]
within_windows = pytest.mark.parametrize("name", TAKES)
with_an_index = pytest.mark.parametrize("name", [name for name in TAKES if methods()[name].indexed])


@within_windows
@pytest.mark.parametrize("window", [7, 40])
def test_a_full_budget_is_dense_attention_in_a_window_of_the_model(name: str, window: int) -> None:
    full_is_dense(name, drawn(1, 70, lengths=[70, 33], window=window))


@with_an_index
@pytest.mark.parametrize("window", [5, 30])
def test_a_window_of_the_model_bounds_what_is_read(name: str, window: int) -> None:
    heads, method = drawn(15, 80, window=window), small(name)
    mask = expanded(method.index(heads), heads)
    torch.testing.assert_close(method.attend(heads).double(), attended(heads, mask), rtol=1e-5, atol=1e-5)
    far = (torch.arange(80).unsqueeze(1) - torch.arange(80)).abs() >= window
    assert not (mask & far).any()


def last_keys(index: AttentionIndex, heads: Heads) -> list[Tensor]:
    """The last token of every tile and column [B, H, R, T], -1 for those that are not used."""
    found = []
    for lists, width in ((index.tiles, index.width), (index.columns, 1)):
        if lists is not None:
            each = lists.long().unsqueeze(-1) + torch.arange(width)
            each = torch.where((lists >= 0).unsqueeze(-1), each, -1)
            if index.permutation is not None:
                order = index.permutation.long().repeat_interleave(each.shape[1] // index.permutation.shape[1], 1)
                order = torch.nn.functional.pad(order, (0, 1), value=-1)
                at = torch.where((each < 0) | (each >= heads.tokens), heads.tokens, each)
                each = order.gather(2, at.flatten(2)).reshape(each.shape)
            found.append(each.amax(-1))
    return found


@with_an_index
@pytest.mark.parametrize("window", [9, 30])
def test_nothing_is_chosen_that_the_window_hides_from_a_whole_row(name: str, window: int) -> None:
    """What no query of a row sees takes no place of its budget."""
    heads, method = drawn(23, 101, lengths=[101, 60], window=window), small(name)
    index = method.index(heads)
    first = torch.arange(-(-101 // index.rows)).unsqueeze(1) * index.rows
    for last in last_keys(index, heads):
        assert ((last < 0) | (last > first - window)).all()


@pytest.mark.parametrize("name", ["hip", "infllm", "block-sparse", "random-tiles"])
def test_a_budget_is_spent_within_the_window(name: str) -> None:
    """Late rows read as many tiles as there are to see, where the budget is that large."""
    heads = drawn(24, 120, window=40)
    more = {"hip": {"local": 1, "keeps": [56, 56]}, "infllm": {"blocks": 8, "local": 4}}
    index = small(name, **more.get(name, {"density": 0.6})).index(heads)
    mask = expanded(index, heads)
    expected = torch.ones(120, 120, dtype=torch.bool).tril().triu(-39)
    late = slice(64, 120)
    assert torch.equal(mask[..., late, :], expected[late].expand(mask[..., late, :].shape))


def test_hip_s_probes_see_what_the_window_shows() -> None:
    """Keys that a window hides are as good as keys that nobody likes."""
    heads, method = drawn(25, 64, size=8, window=20), HiP(sink=2, local=4, chunks=8, keeps=16, strides=1, block=8)
    row, starts = 5, torch.arange(2, 60, 8)[None, None, None]
    keys = heads.keys.clone()
    keys[:, :, : row * 8 + 8 - 20] = 1e4 * keys[:, :, : row * 8 + 8 - 20]
    loud = replace(heads, keys=keys)
    shown = starts.flatten() > row * 8 + 8 - 20
    got, expected = (method.scores(one, starts, 8, 1)[:, :, row, shown] for one in (loud, heads))
    assert torch.equal(got[..., 0], expected[..., 0])
    hidden = method.scores(loud, starts, 8, 1)[:, :, 7, :4]
    assert (hidden == torch.finfo().min).all()


def test_pbs_orders_keys_by_what_the_last_queries_see() -> None:
    """Where they see nothing, keys stay as they are."""
    heads = drawn(26, 96, window=24)
    order = PBS(block=8, segment=16).order(heads).long()
    assert torch.equal(order[..., :64], torch.arange(64).expand(2, 2, -1))
    assert not torch.equal(order[..., 80:], torch.arange(80, 96).expand(2, 2, -1))
