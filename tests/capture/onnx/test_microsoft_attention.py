"""Attention as ONNX Runtime writes it, against ONNX Runtime: every kind of mask, bias, cache and packing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx_node import Case, got, want
from torch import Tensor

GENERATOR = torch.Generator().manual_seed(1)
B, N, M, P, H, D = 2, 5, 7, 3, 2, 4  # rows, tokens, keys of another input, tokens before, heads, and their size
C = H * D


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def whole(*entries: Any) -> Tensor:
    return torch.tensor(entries, dtype=torch.int32)


def some(*shape: int) -> Tensor:
    """Mostly ones; the first of each row is one."""
    mask = (torch.rand(shape, generator=GENERATOR) > 0.3).to(torch.int32)
    mask[..., 0] = 1
    return mask


X, WEIGHT, BIAS = floats(B, N, C), floats(C, 3 * C) * 0.5, floats(3 * C)
REAL, REAL_BEHIND_PAST = whole([1, 1, 1, 0, 0], [0, 1, 1, 1, 1]), whole([1] * 8, [0, 0, *[1] * 6])
PAST, PAST_K, PAST_V = floats(2, B, H, P, D), floats(B, H, P, D), floats(B, H, P, D)
K, V, SEEN = floats(B, M, C), floats(B, M, C), whole([1] * 7, [1, 1, 1, 1, 0, 0, 0])
APART_K, APART_V = floats(B, H, M, D), floats(B, H, M, D)


def fused(
    mask: Tensor | None = None, past: Tensor | None = None, bias: Tensor | None = None, both: bool = False, **kw: Any
) -> Case:
    inputs = [X, kw.pop("weight", WEIGHT), kw.pop("projection_bias", BIAS), mask, past, bias]
    return Case("Attention", inputs, {"num_heads": H, **kw}, (0, 1) if both else (0,), (1, 2))


def multi(q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *more: Tensor | None, **kw: Any) -> Case:
    outputs = kw.pop("outputs", (0,))
    return Case("MultiHeadAttention", [q, k, v, *more], {"num_heads": H, **kw}, outputs, floats=True)


ATTENTION = {
    "plain": fused(),
    "causal": fused(unidirectional=1),
    "scaled": fused(scale=0.3),
    "mask [B, N]": fused(REAL),
    "mask [B, N], causal": fused(REAL, unidirectional=1),
    "mask [B, N] that hides all of a row": fused(whole([0] * 5, [1] * 5)),
    "mask [B, N] with another number": fused(REAL, mask_filter_value=-3.4e38),
    "mask [B, N] with a number that hides little": fused(REAL, mask_filter_value=-2.0),
    "mask of lengths": fused(whole(3, 5)),
    "mask of lengths, causal": fused(whole(3, 5), unidirectional=1),
    "mask of ends and starts": fused(whole(3, 5, 0, 1)),
    "mask [B, N, N]": fused(some(B, N, N)),
    "bias per head": fused(bias=floats(B, H, N, N)),
    "bias for all rows": fused(bias=floats(1, H, N, N)),
    "bias for all heads, and a mask": fused(REAL, bias=floats(B, 1, N, N)),
    "bias and a mask, causal": fused(REAL, bias=floats(1, 1, N, N), unidirectional=1),
    "values of another width": fused(
        weight=floats(C, 2 * C + 6), projection_bias=floats(2 * C + 6), qkv_hidden_sizes=[C, C, 6]
    ),
    "keys and values as well": fused(both=True),
    "past": fused(past=PAST, both=True),
    "past and mask": fused(REAL_BEHIND_PAST, PAST, both=True),
    "past and mask, causal": fused(REAL_BEHIND_PAST, PAST, both=True, unidirectional=1),
    "past and lengths": fused(whole(6, 8), PAST, both=True),
}
MULTI_HEAD = {
    "plain": multi(X, K, V),
    "scaled": multi(X, K, V, scale=0.2),
    "bias of projections": multi(X, K, V, BIAS),
    "mask [B, M]": multi(X, K, V, None, SEEN),
    "mask [B, M] with another number": multi(X, K, V, None, SEEN, mask_filter_value=-5.0),
    "mask of lengths": multi(X, K, V, None, whole(7, 4)),
    "mask [B, N, M]": multi(X, K, V, None, some(B, N, M)),
    "bias and mask": multi(X, K, V, BIAS, SEEN, floats(1, H, N, M)),
    "bias for all heads": multi(X, K, V, BIAS, SEEN, floats(1, 1, N, M)),
    "values of another width": multi(X, K, floats(B, M, 6), floats(2 * C + 6)),
    "causal": multi(X, floats(B, N, C), floats(B, N, C), unidirectional=1),
    "heads apart": multi(X, APART_K, APART_V),
    "heads apart, bias": multi(X, APART_K, APART_V, BIAS),
    "heads apart, mask": multi(X, APART_K, APART_V, None, SEEN),
    "keys and values as well": multi(X, K, V, outputs=(0, 1, 2)),
    "past": multi(X, X, X, None, None, None, PAST_K, PAST_V, outputs=(0, 1, 2)),
    "past, causal": multi(X, X, X, BIAS, REAL_BEHIND_PAST, None, PAST_K, PAST_V, outputs=(0, 1, 2), unidirectional=1),
    "logits": multi(X, K, V, None, SEEN, floats(1, H, N, M), outputs=(0, 1, 2, 3)),
}
INTEGERS = [torch.randint(0, 255, shape, generator=GENERATOR).to(torch.uint8) for shape in ((B, N, C), (C, 3 * C))]
SCALES = [torch.tensor(0.02), torch.tensor(0.01)]
ZEROS = [torch.tensor(120, dtype=torch.uint8), torch.tensor(130, dtype=torch.uint8)]
QUANTISED = {
    "plain": Case("QAttention", [*INTEGERS, BIAS, *SCALES, None, *ZEROS], {"num_heads": H}),
    "mask of lengths, causal": Case(
        "QAttention", [*INTEGERS, BIAS, *SCALES, whole(5, 3), *ZEROS], {"num_heads": H, "unidirectional": 1}
    ),
    "mask [B, N]": Case("QAttention", [*INTEGERS, BIAS, *SCALES, REAL, *ZEROS], {"num_heads": H}),
    "past": Case("QAttention", [*INTEGERS, BIAS, *SCALES, None, *ZEROS, PAST], {"num_heads": H}, (0, 1)),
    "by column": Case(
        "QAttention",
        [INTEGERS[0], INTEGERS[1].to(torch.int8), BIAS, SCALES[0], floats(3 * C).abs() * 0.01, None, ZEROS[0],
         torch.zeros(3 * C, dtype=torch.int8)],
        {"num_heads": H},
    ),
}  # fmt: skip
CASES = {
    f"{op}, {name}": case
    for op, cases in (("Attention", ATTENTION), ("MultiHeadAttention", MULTI_HEAD), ("QAttention", QUANTISED))
    for name, case in cases.items()
}


def assert_equal(results: list[np.ndarray[Any, Any]], expected: list[np.ndarray[Any, Any]]) -> None:
    assert len(results) == len(expected)
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_attention_of_onnx_runtime(name: str) -> None:
    assert_equal(got(CASES[name]), want(CASES[name]))


# --- what ONNX Runtime has no CPU kernel for: the same said otherwise ------------------------------------------------


def test_no_bias_is_a_bias_of_zeros() -> None:
    assert_equal(got(Case("Attention", [X, WEIGHT, None, REAL], {"num_heads": H})), want(
        fused(REAL, projection_bias=BIAS * 0)
    ))  # fmt: skip


def test_half_precision_hides_as_much() -> None:
    half = [None if x is None else x.half() if x.is_floating_point() else x for x in fused(REAL).inputs]
    case = Case("Attention", half, {"num_heads": H, "mask_filter_value": -3.4e38}, constants=(1, 2))
    (result,), (expected,) = got(case), want(fused(REAL, mask_filter_value=-3.4e38))
    assert result.dtype == np.float16
    np.testing.assert_allclose(result.astype(np.float32), expected, rtol=1e-2, atol=2e-2)


def test_a_square_mask_is_read_in_its_last_rows() -> None:
    square = some(B, 1, 9, 9)
    plain = square[:, 0, P : P + N, : P + N]
    assert_equal(got(fused(square, PAST, both=True)), want(fused(plain.contiguous(), PAST, both=True)))


def test_packed_queries_keys_and_values_are_the_parts_side_by_side() -> None:
    q, k, v = floats(B, N, H, D), floats(B, N, H, D), floats(B, N, H, D)
    apart = multi(q.flatten(2), k.flatten(2), v.flatten(2), BIAS)
    assert_equal(got(multi(torch.stack([q, k, v], 3), None, None, BIAS)), want(apart))
    assert_equal(got(multi(q.flatten(2), torch.stack([k, v], 3), None, BIAS)), want(apart))


# --- grouped queries ------------------------------------------------------------------------------------------------

HEADS, GROUPS, SIZE = 4, 2, 16


def grouped(
    tokens: int = 5,
    *,
    rows: int = 2,
    past: int | None = None,
    lengths: tuple[int, ...] = (),
    packed: bool = False,
    rotated: bool = False,
    positions: Tensor | None = None,
    bias: tuple[int, ...] = (),
    sink: bool = False,
    outputs: tuple[int, ...] = (0, 1, 2),
    **kw: Any,
) -> Case:
    """Keys and values of `lengths` in all, the first `past` of them, or as many as there is room for, in the cache."""
    total = max(lengths, default=tokens + (past or 0))
    lengths = lengths or (total,) * rows
    q, k, v = (floats(rows, tokens, heads * SIZE) for heads in (HEADS, GROUPS, GROUPS))
    caches = [None, None] if past is None else [floats(rows, GROUPS, past, SIZE), floats(rows, GROUPS, past, SIZE)]
    turns = [floats(32, SIZE // 2).cos(), floats(32, SIZE // 2).sin()] if rotated else [None, None]
    inputs = [
        *([torch.cat([q, k, v], -1), None, None] if packed else [q, k, v]),
        *caches,
        whole(*(length - 1 for length in lengths)),
        torch.tensor(total, dtype=torch.int32),
        *turns,
        positions,
        floats(*bias) if bias else None,
        floats(HEADS) if sink else None,
    ]
    given = {"num_heads": HEADS, "kv_num_heads": GROUPS, "do_rotary": int(rotated), **kw}
    return Case("GroupQueryAttention", inputs, given, outputs, (6,))


GROUPED = {
    "prompt": grouped(),
    "prompt, not causal": grouped(causal=0),
    "prompt, packed": grouped(packed=True),
    "prompts of two lengths": grouped(lengths=(5, 3)),
    "an empty past": grouped(past=0, lengths=(5, 3)),
    "one more token": grouped(1, past=6),
    "some more tokens": grouped(4, rows=1, past=3),
    "a window": grouped(local_window_size=2),
    "a window and a past": grouped(4, rows=1, past=3, local_window_size=2),
    "soft cap": grouped(softcap=3.0),
    "scaled": grouped(scale=0.1),
    "a sink of zeros": grouped(smooth_softmax=1),
    "sinks, a cap and a window": grouped(sink=True, softcap=2.0, local_window_size=3),
    "rotated": grouped(rotated=True),
    "rotated neighbours": grouped(rotated=True, rotary_interleaved=1),
    "rotated, packed, behind a past": grouped(4, rows=1, past=3, rotated=True, packed=True),
    "rotated by positions": grouped(rotated=True, positions=torch.tensor([[2, 3, 4, 5, 6]] * 2)),
    "rotated by positions behind a past": grouped(
        4, rows=1, past=3, rotated=True, positions=torch.tensor([[5, 1, 7, 9]])
    ),
    "a bias": grouped(bias=(2, HEADS, 5, 5)),
    "a bias for all, behind a past": grouped(4, rows=1, past=3, bias=(1, 1, 4, 7)),
    "logits": grouped(outputs=(0, 1, 2, 3), qk_output=1, softcap=2.0, bias=(1, 1, 5, 5)),
    "probabilities": grouped(outputs=(0, 1, 2, 3), qk_output=2),
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_queries(name: str) -> None:
    assert_equal(got(GROUPED[name]), want(GROUPED[name]))


CACHES = {  # (tokens, room in the cache, tokens in all per row)
    "one more token, of rows of two lengths": (1, 6, (7, 4)),
    "prompts in a cache with room": (5, 12, (5, 2)),
    "one more token in a cache with room": (1, 12, (6, 3)),
}


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", CACHES)
def test_caches_with_rows_of_several_lengths(name: str, rotated: bool) -> None:
    """ONNX Runtime leaves what lies behind each row's last token as it was in memory."""
    tokens, past, lengths = CACHES[name]
    case = grouped(tokens, past=past, lengths=lengths, rotated=rotated)
    results, expected = got(case), want(case)
    assert_equal(results[:1], expected[:1])
    for one, other in zip(results[1:], expected[1:], strict=True):
        assert one.shape == other.shape
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(one[row, :, :length], other[row, :, :length], rtol=1e-5, atol=1e-5)


def test_queries_and_keys_are_normed_per_head_before_they_are_rotated() -> None:
    case = grouped(rotated=True)
    by_head = floats(SIZE), floats(SIZE)
    inputs = [*case.inputs[:12], None, None, *by_head]
    normed = [
        F.rms_norm(x.unflatten(-1, (-1, SIZE)), [SIZE], weight, 1e-6).flatten(-2)
        for x, weight in zip(case.inputs[:2], by_head, strict=True)
        if x is not None
    ]
    plain = Case(case.op, [*normed, *case.inputs[2:]], case.attributes, case.outputs, case.constants)
    assert_equal(got(Case(case.op, inputs, case.attributes, case.outputs, case.constants)), want(plain))


def test_what_is_not_seen_weighs_nothing() -> None:
    """The mask of lengths: changing what it hides changes nothing."""
    (before,) = got(fused(whole(3, 5)))
    other = X.clone()
    other[0, 3:] += 1
    (after,) = got(Case("Attention", [other, WEIGHT, BIAS, whole(3, 5)], {"num_heads": H}, constants=(1, 2)))
    assert np.array_equal(before[0, :3], after[0, :3])
    assert math.isfinite(after.sum())
