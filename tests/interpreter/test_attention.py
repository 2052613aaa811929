"""Attention's kernels where samples do not reach: keys hidden in whole tiles, queries that see none, other types."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budgets import assert_within_budget, in_float64
from index_cases import narrow_case

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.kernels.triton import block_sparse_attention, twin_of
from tamis.kernels.triton.launch import run
from tamis.op import OPS

INFINITE = float("inf")


def kernel(name: str, *args: Any) -> Any:
    twin = twin_of(OPS[name])
    assert twin is not None
    assert not twin.why_not(*args)
    return run(twin, *args)


def tensors(rows: int = 19, keys: int = 53, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q [2, 4, rows, 24], and k and v of two heads, as slices of packed projections."""
    generator = torch.Generator().manual_seed(rows)
    shapes = [(4, rows), (2, keys), (2, keys)]
    packed = [torch.randn(2, n, 2, heads, 24, generator=generator).to(dtype) for heads, n in shapes]
    return [x[:, :, 1].transpose(1, 2) for x in packed]


def compare(name: str, *args: Any) -> None:
    op = OPS[name]
    assert_within_budget(kernel(name, *args), op.reference(*args), op.reference(*in_float64(args)))


@pytest.mark.parametrize("hidden", [slice(0, 32), slice(16, 48), slice(1, 53)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter multiplies bfloat16 as integers
def test_whole_tiles_of_hidden_keys_change_nothing(hidden, dtype):
    q, k, v = tensors(dtype=dtype)
    bias = torch.zeros(2, 53)
    bias[:, hidden] = -INFINITE
    compare("attention_with_lse", q, k, v, bias, None, 0.3, False)
    compare("attention_rows", q, k, bias, None, 0.3)
    lse = OPS["attention_lse"].reference(q, k, bias, None, 0.3, False)
    compare("attention_received", q, k, lse, bias, None, None, 0.3, False)


@pytest.mark.parametrize(("scale", "causal"), [(0.3, False), (0.3, True), (0.0, False), (-0.3, False)])
def test_any_scale(scale, causal):
    """Causal ones only where torch has them: it takes the root of the scale."""
    q, k, v = tensors(53, 37)
    compare("attention_with_lse", q, k, v, None, None, scale, causal)
    compare("attention", q, k, v, None, None, scale, causal, 2.0)


def test_a_query_that_sees_no_key_gets_zeros_and_attends_to_nothing():
    q, k, v = tensors()
    seen = torch.rand(2, 1, 19, 53, generator=torch.Generator().manual_seed(0)) > 0.5
    seen[..., 0] = True
    seen[1, :, 7] = False
    out, lse = kernel("attention_with_lse", q, k, v, None, seen, 0.3, False)
    assert torch.equal(out[1, :, 7], torch.zeros(4, 24))
    assert torch.equal(lse[1, :, 7], torch.full((4,), -INFINITE))
    expected, expected_lse = (OPS[name].reference for name in ("attention", "attention_lse"))
    others = [row for row in range(19) if row != 7]
    truth = expected(q, k, v, None, seen, 0.3, False)
    torch.testing.assert_close(out[:, :, others], truth[:, :, others], rtol=1e-5, atol=1e-6)
    received = kernel("attention_received", q, k, lse, None, seen, None, 0.3, False)
    shares = (expected_lse(q, k, None, seen, 0.3, False) > -INFINITE).float().mean(-1)
    torch.testing.assert_close(received.sum(-1), shares, rtol=1e-5, atol=1e-6)
    rows = kernel("attention_rows", q, k, None, seen, 0.3)
    assert rows[1, :, 7].isnan().all()
    assert rows[:, :, others].isfinite().all()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_query_whose_keys_all_have_the_lowest_number_attends_to_all_alike(softcap):
    q, k, v = tensors()
    mask = torch.zeros(2, 1, 19, 53)
    mask[1, :, 7] = torch.finfo(torch.float32).min
    mask[0, :, 3] = torch.finfo(torch.bfloat16).min
    mask[:, :, 11, 5:] = torch.finfo(torch.float32).min
    compare("attention", q, k, v, None, mask, 0.3, False, softcap)
    mean = v[1].mean(1).repeat_interleave(2, 0)
    torch.testing.assert_close(kernel("attention", q, k, v, None, mask, 0.3, False, softcap)[1, :, 7], mean)
    lse = OPS["attention_lse"].reference(q, k, None, mask, 0.3, False)
    assert lse[1, :, 7].tolist() == [torch.finfo(torch.float32).min] * 4
    torch.testing.assert_close(kernel("attention_lse", q, k, None, mask, 0.3, False), lse, rtol=1e-6, atol=1e-6)
    rows = kernel("attention_rows", q, k, None, mask, 0.3)
    torch.testing.assert_close(rows[1, :, 7], torch.full((4, 53), 1 / 53))
    compare("attention_rows", q, k, None, mask, 0.3)
    received = kernel("attention_received", q, k, lse, None, mask, None, 0.3, False)
    truth = OPS["attention_received"].reference(q, k, lse, None, mask, None, 0.3, False)
    torch.testing.assert_close(received, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wide", ["rows", "columns"])
def test_a_mask_whose_elements_lie_billions_apart(wide):
    """One that is a view: its offsets need 64 bits.  Pages of the storage that nothing touches cost no memory."""
    count, apart = 130, 2**24
    place = (apart, 1) if wide == "rows" else (1, apart)
    mask = torch.zeros(count * apart, dtype=torch.bool).as_strided((1, 1, count, count), (0, 0, *place))
    mask.fill_(True)
    mask[0, 0, 129, 60:] = False
    mask[0, 0, :, 129] = False
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, count, 16, generator=generator) for _ in range(3))
    lse = OPS["attention_lse"].reference(q, k, None, mask, 0.3, False)
    compare("attention", q, k, v, None, mask, 0.3, False)
    received = kernel("attention_received", q, k, lse, None, mask, None, 0.3, False)
    truth = OPS["attention_received"].reference(q, k, lse, None, mask, None, 0.3, False)
    torch.testing.assert_close(received, truth, rtol=1e-5, atol=1e-6)


def test_the_kernel_s_own_log_sum_exp_makes_columns_that_add_up_to_one():
    q, k, v = tensors(53, 53)
    for causal in (False, True):
        _, lse = kernel("attention_with_lse", q, k, v, None, None, 0.3, causal)
        received = kernel("attention_received", q, k, lse, None, None, None, 0.3, causal)
        torch.testing.assert_close(received.sum(-1), torch.ones(2, 4), rtol=1e-5, atol=1e-6)


def test_what_kernels_do_not_take_is_said():
    q, k, v = tensors()
    twin = twin_of(OPS["attention"])
    assert twin is not None
    rest = (None, None, 0.3, False)
    assert "float64" in twin.why_not(q.double(), k.double(), v.double(), *rest)
    assert "one of float16" in twin.why_not(q.half(), k, v, *rest)
    wide = torch.zeros(1, 1, 4, 160)
    assert "head sizes up to 128, not 160" in twin.why_not(wide, wide, wide, *rest)


@pytest.mark.parametrize("name", ["attention", "attention_with_lse", "attention_lse", "attention_rows"])
def test_keys_of_another_batch_size_are_refused(name):
    """The reference broadcasts them; a kernel would read beyond them."""
    q, k, v = tensors()
    values = (v[:1],) if name in ("attention", "attention_with_lse") else ()
    twin = twin_of(OPS[name])
    assert twin is not None
    rest = (None, None, 0.3, False)[: 3 if name == "attention_rows" else 4]
    assert "batch sizes 1, 2" in twin.why_not(q, k[:1], *values, *rest)
    if values:
        assert "batch sizes 1, 2" in twin.why_not(q, k, *values, *rest)


@pytest.mark.parametrize(
    ("share", "sink", "local", "order", "causal", "window"),
    [("kv", 0, 0, False, True, 0), ("query", 3, 12, True, True, 0), ("kv", 2, 5, False, False, 30)],
)
def test_whole_tiles_and_rows_by_length(share, sink, local, order, causal, window, monkeypatch):
    """Tiles as wide as what is multiplied at once, over rows that are sorted by what they read."""
    monkeypatch.setattr(block_sparse_attention, "ORDERED", 1)
    monkeypatch.setattr(block_sparse_attention, "PROGRAMS", 5)
    q, k, v = tensors(41, 41)
    generator = torch.Generator().manual_seed(sink)
    sets = 2 if share == "kv" else 4
    starts = 16 * torch.rand(2, sets, 4, 3, generator=generator).argsort(-1)
    tiles = torch.where(torch.rand(starts.shape, generator=generator) > 0.4, starts, -1).int()
    columns = torch.where((tiles != 32).all(-1, keepdim=True), 37, -1).int()
    positions = torch.rand(2, 2, 41, generator=generator).argsort(-1) if order else None
    index = (
        tiles,
        columns,
        positions,
        torch.tensor([41, 30]),
        share,
        12,
        16,
        sink,
        local,
        0,
        3,
        0.3,
        causal,
        None,
        window,
    )
    compare("block_sparse_attention_with_lse", q, k, v, *index)


@pytest.mark.parametrize("size", [80, 96])
def test_heads_narrower_than_a_tile_keep_their_scale(size):
    """T14 of the cards' tests: the kernel multiplies 128 columns."""
    case, expected = narrow_case(size, torch.float16)
    reference = OPS["block_sparse_attention"].reference(*case.args)
    assert_within_budget(kernel("block_sparse_attention", *case.args), reference, expected)
