"""What holds for the kernel that reduces tokens beyond its budget: copies, order, and what stays within a slot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.kernels.merge_tokens import drawn_plan
from tamis.kernels.triton.launch import run
from tamis.kernels.triton.merge import TWIN as MERGE
from tamis.kernels.triton.reduce import TWIN as REDUCE
from tamis.kernels.triton.reduce_norm import TWIN as REDUCE_NORM


def crowd(tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row whose tokens all go to slot 0, led by a token in the middle, but for the last."""
    leader = torch.tensor([[tokens // 2, tokens - 1]])
    slot = torch.zeros(1, tokens, dtype=torch.int64)
    slot[0, -1] = 1
    moved = torch.tensor([[i for i in range(tokens - 1) if i != tokens // 2]])
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(1, tokens, width, generator=generator), slot, leader, moved


@pytest.mark.parametrize("tokens", [33, 34, 35, 101])
def test_tokens_are_added_in_ascending_order(tokens):
    x, slot, leader, moved = crowd(tokens, 7)
    weight = torch.arange(1.0, tokens + 1).unsqueeze(0)
    y, mass = run(MERGE, x, slot, leader, moved, weight, False)
    led = total = x[0, tokens // 2]
    for i in moved[0].tolist():
        total = total + (x[0, i] - led) * (weight[0, i] / weight[0, :-1].sum())
    assert torch.equal(y[0, 0], total)
    assert mass.tolist() == [[float(weight[0, :-1].sum()), float(tokens)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_slot_of_one_token_or_of_equal_ones_is_a_copy(dtype):
    x, slot, leader, moved, weight = drawn_plan(2, 29, 17, 9)
    x = x.to(dtype)
    alone = torch.ones_like(leader, dtype=torch.bool).scatter(1, slot.gather(1, moved), False)
    y, _ = run(MERGE, x, slot, leader, moved, weight, False)
    led = x.gather(1, leader.unsqueeze(2).expand(-1, -1, 9))
    assert torch.equal(y[alone], led[alone])
    assert not torch.equal(y[~alone], led[~alone])
    equal = led.gather(1, slot.unsqueeze(2).expand(-1, -1, 9))
    y, _ = run(MERGE, equal, slot, leader, moved, weight, False)
    assert torch.equal(y, led)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_within_its_slot(value):
    x, slot, leader, moved, weight = drawn_plan(2, 29, 17, 9)
    x[1, moved[1, 3]] = value
    hit = torch.zeros(2, 17, dtype=torch.bool)
    hit[1, slot[1, moved[1, 3]]] = True
    merged, _ = run(MERGE, x, slot, leader, moved, weight, False)
    total = run(REDUCE, x, slot, leader, moved, weight, False)
    normed = run(REDUCE_NORM, x, None, None, slot, leader, moved, weight, None, True, "layer", None, None, 1e-6, False)
    for y in (merged, total, *normed[:2]):
        assert torch.equal(y.isfinite().all(2), ~hit)


def test_a_slot_that_weighs_nothing_is_nan():
    x, slot, leader, moved = crowd(5, 3)
    y, mass = run(MERGE, x, slot, leader, moved, torch.tensor([[0.0, 0.0, 0.0, 0.0, 2.0]]), False)
    assert y[0, 0].isnan().all()
    assert torch.equal(y[0, 1], x[0, 4])
    assert mass.tolist() == [[0.0, 2.0]]


def test_a_row_of_the_batch_is_computed_as_if_alone():
    x, *plan, weight = drawn_plan(3, 43, 19, 70)
    norm = None, True, "layer", x[0, 0], x[0, 1], 1e-6, False
    whole = run(REDUCE_NORM, x, x.flip(1), None, *plan, weight, *norm)
    for i in range(3):
        x_i, added, *plan_i, weight_i = (one[i : i + 1] for one in (x, x.flip(1), *plan, weight))
        alone = run(REDUCE_NORM, x_i, added, None, *plan_i, weight_i, *norm)
        for have, want in zip(alone, whole, strict=True):
            assert torch.equal(have, want[i : i + 1])


@pytest.mark.parametrize(("dtype", "served"), [(torch.float16, True), (torch.float64, False), (torch.int64, False)])
def test_what_does_not_fit_in_float32_is_not_served(dtype, served):
    x, *plan, _ = drawn_plan(1, 5, 3, 2)
    assert (REDUCE.why_not(x.to(dtype), *plan, None, False) == "") is served
