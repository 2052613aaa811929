"""add_reduce_norm against its definition, written out with one matrix per row of the batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tamis.kernels.add_reduce_norm import reference
from tamis.kernels.merge_tokens import drawn_plan, sample_plan

WIDTH = 5


def normalised(y: Tensor, norm: str, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y / (y.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return y * (1 if gamma is None else gamma) + (0 if beta is None else beta)


def by_matrix(x: Tensor, slot: Tensor, slots: int, weight: Tensor | None, mean: bool) -> tuple[Tensor, Tensor]:
    """The reduced tokens, and what each slot weighs."""
    weight = torch.ones(slot.shape, dtype=x.dtype) if weight is None else weight
    members = (slot.unsqueeze(1) == torch.arange(slots).reshape(1, -1, 1)) * weight.unsqueeze(1)
    mass = members.sum(2)
    return members @ x / (mass.unsqueeze(2) if mean else 1), mass


def expected(x: Tensor, added: Any, scale: Any, slot: Tensor, leader: Tensor, *rest: Any) -> list[Tensor]:
    moved, weight, valid, mean, norm, gamma, beta, eps, first = rest
    x = x + (0 if added is None else added * (1 if scale is None else scale))
    x = normalised(x, norm, gamma, beta, eps) if norm and first else x
    if moved is None:
        slot = torch.full_like(slot, -1).scatter(1, leader, torch.arange(leader.shape[1]).expand(leader.shape))
    y, mass = by_matrix(x, slot, leader.shape[1], weight, mean)
    mass = torch.where(valid, mass, 0.0) if valid is not None else mass
    after = [normalised(y, norm, gamma, beta, eps)] if norm and not first else []
    return [y, *after, *([mass, mass.log()] if mean and moved is not None else [])]


@pytest.mark.parametrize("norm", ["", "layer", "rms"])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("merges", [True, False])
def test_the_reference_is_the_definition(mean, norm, merges):
    x, slot, leader, moved, weight = sample_plan()
    generator = torch.Generator().manual_seed(2)
    x, added = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    gamma, beta, scale = torch.randn(3, WIDTH, generator=generator, dtype=torch.float64)
    valid = torch.tensor([[True, False, True, True], [True, True, True, False]])
    given_weight = weight.double() if merges else None
    for residual, factor, first in itertools.product((None, added), (None, scale), (False, True)):
        plan = slot, leader, moved if merges else None, given_weight, valid if mean else None
        args = (x, residual, factor, *plan, mean, norm, gamma, beta if norm == "layer" else None, 1e-5, first)
        got = [one for one in reference(*args) if one.shape != (0,)]
        for have, want in zip(got, expected(*args), strict=True):
            torch.testing.assert_close(have.double(), want, rtol=1e-6, atol=1e-6)


def test_the_result_is_rounded_once():
    """In bfloat16 it is nearer to the truth than an add, a merge and a norm that each round."""
    x, *plan, weight = drawn_plan(2, 41, 23, 64)
    added, half = x.flip(1), torch.bfloat16
    rest = weight, None, True, "layer", None, None, 1e-6, False
    rounded = x.to(half), added.to(half)
    truth = reference(*(one.double() for one in rounded), None, *plan, *rest)[1]
    got = reference(*rounded, None, *plan, *rest)[1]
    torch.testing.assert_close(got.double(), truth, rtol=2**-8, atol=1e-5)  # half a unit in the last place
    total, _ = torch.ops.tamis.merge_tokens(sum(rounded), *plan, weight, False)
    apart = torch.nn.functional.layer_norm(total, [64], None, None, 1e-6)
    assert (got - truth).norm() < 0.7 * (apart - truth).norm()
