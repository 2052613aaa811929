"""Drift by hand-made outputs."""

from __future__ import annotations

import math

import pytest
import torch
from toys import toy_graph

from tamis.errors import InputMismatch
from tamis.runtime.verify import combine, drift, token_axes_of

ROWS = torch.tensor([[3.0, 4.0], [0.0, 2.0]])


def test_the_worst_row_counts() -> None:
    moved = torch.tensor([[3.0, 4.5], [0.0, 2.5]])  # 0.5/5 and 0.5/2
    found = drift(ROWS, moved)
    assert found.relative_l2 == pytest.approx(0.25)
    assert found.rows == 2
    assert found.outputs == {"output": pytest.approx(0.25)}
    assert found.cosine == pytest.approx((9 + 18) / (5 * math.sqrt(9 + 20.25)))


def test_equal_outputs_have_no_drift() -> None:
    zero = torch.zeros(2, 3)
    found = drift({"a": zero, "b": ROWS}, {"a": zero, "b": ROWS.clone()})
    assert (found.relative_l2, found.cosine) == (0.0, 1.0)


def test_all_tokens_of_an_entry_are_one_row() -> None:
    tokens = torch.ones(1, 4, 2)
    moved = tokens.clone()
    moved[0, 0] = 2
    assert drift(tokens, moved).relative_l2 == pytest.approx(math.sqrt(2 / 8))


def test_of_one_axis_every_number_is_a_row() -> None:
    result = drift(torch.tensor([4.0, 2.0, 1.0]), torch.tensor([4.0, 3.0, 1.0]))
    assert (result.relative_l2, result.rows) == (0.5, 3)
    assert drift(torch.empty(0, 4), torch.empty(0, 4)).relative_l2 == 0.0


def test_masked_tokens_do_not_count() -> None:
    tokens = torch.ones(2, 3, 4)
    moved = tokens.clone()
    moved[1, 2] = math.nan
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert drift(tokens, moved).relative_l2 == math.inf
    assert drift(tokens, moved, mask).relative_l2 == 0
    assert drift(tokens, moved, mask, {}).relative_l2 == math.inf
    heads, moved_heads = tokens.unsqueeze(1), moved.unsqueeze(1)  # [B, H, N, D], as a cache has it
    assert drift(heads, moved_heads, mask, {0: 2}).relative_l2 == 0
    assert drift(heads, moved_heads, mask, {0: 1}).relative_l2 == math.inf


def test_logits_agree_on_the_largest() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 1.0]])
    moved = torch.tensor([[1.0, 2.5, 0.0], [0.0, 0.0, 1.0]])
    assert drift(logits, moved).top1 == 0.5
    assert (
        drift({"logits": logits, "tokens": torch.ones(2, 3, 1)}, {"logits": moved, "tokens": torch.ones(2, 3, 1)}).top1
        == 0.5
    )
    assert drift({"pooled": logits, "x": logits}, {"pooled": moved, "x": logits}).top1 is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_is_infinitely_far(value: float) -> None:
    moved = ROWS.clone()
    moved[1, 1] = value
    assert drift(ROWS, moved).relative_l2 == math.inf


def test_equal_infinities_are_no_difference() -> None:
    a = torch.tensor([[1.0, -math.inf, 2.0]])
    assert drift(a, a + 0).relative_l2 == 0
    assert drift(a, torch.tensor([[1.0, -math.inf, 2.5]])).relative_l2 == pytest.approx(0.5 / math.sqrt(5))


def test_a_zero_row_that_moved() -> None:
    assert drift(torch.zeros(1, 2), torch.ones(1, 2)).relative_l2 == math.inf


def test_shorter_outputs_are_left_out_and_said() -> None:
    found = drift({"a": ROWS, "tokens": torch.ones(2, 5, 1)}, {"a": ROWS, "tokens": torch.ones(2, 3, 1)})
    assert found.left_out == {"tokens": "the result has another shape (restore=False)"}
    assert list(found.outputs) == ["a"]


def test_other_structure_is_refused() -> None:
    with pytest.raises(InputMismatch, match="must have the original's structure"):
        drift((ROWS, ROWS), (ROWS,))


def test_half_precision_is_compared_exactly() -> None:
    a = torch.full((1, 4096), 300.0, dtype=torch.float16)  # its squared norm overflows float16
    assert drift(a, a * 1.5).relative_l2 == pytest.approx(0.5)


def test_calls_combine() -> None:
    a, b = drift(ROWS, ROWS), drift(ROWS[:1], ROWS[:1] * 2)
    both = combine([a, b])
    assert (both.relative_l2, both.rows, both.top1) == (pytest.approx(1.0), 3, 1.0)


def test_token_outputs_share_the_length_symbol() -> None:
    assert token_axes_of(toy_graph().program, "attention_mask") == {1: 1}


class Named(tuple):
    """A class of outputs that says how it is taken apart, and not what its parts are called."""


torch.utils._pytree.register_pytree_node(Named, lambda one: (list(one), None), lambda parts, _: Named(parts))


def test_outputs_without_names_are_numbered() -> None:
    assert drift(Named((ROWS,)), Named((ROWS,))).outputs == {"output": 0.0}
    assert drift(Named((ROWS, ROWS)), Named((ROWS, 2 * ROWS))).outputs == {"0": 0.0, "1": 1.0}
