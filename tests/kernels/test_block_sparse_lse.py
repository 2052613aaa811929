"""The log-sum-exp of attention over an index, and what follows from it, against the definition pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from index_cases import Case, drawn_case
from sparse_oracle import attended, fixture
from torch import Tensor

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.kernels.block_sparse_attention_with_lse import merged
from tamis.op import OPS

every_case = pytest.mark.parametrize("seed", range(24))
both = pytest.mark.parametrize("form", ["called", "inlined"])


def with_lse(form: str, name: str = "block_sparse_attention_with_lse") -> Any:
    op = OPS[name]
    return op.call if form == "called" else op.reference


def logits_of(case: Case) -> Tensor:
    """[B, H, N, N] float64, -inf for pairs that are not read."""
    group = case.q.shape[1] // case.k.shape[1]
    logits = case.scale * (case.q.double() @ case.k.double().repeat_interleave(group, 1).mT)
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    for b, row in enumerate(case.sets):
        for h, head in enumerate(row):
            for i, some in enumerate(head):
                seen[b, h, i, list(some)] = True
    return torch.where(seen, logits, -torch.inf)


@both
@every_case
def test_the_sums_are_those_of_the_pairs(seed: int, form: str) -> None:
    case = drawn_case(seed)
    out, lse = with_lse(form)(*case.args)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), logits_of(case).logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, torch.ops.tamis.block_sparse_attention(*case.args), rtol=1e-5, atol=1e-5)


@both
def test_two_halves_merge_into_dense_attention(form: str) -> None:
    """The worked example: keys 0 to 7 and 8 to 15 apart; the first eight queries read nothing of the second half."""
    heads = fixture()
    parts = []
    for start in (0, 8):
        tile = torch.tensor([start], dtype=torch.int32).reshape(1, 1, 1, 1)
        index = (tile, None, None, None, "layer", 16, 8, 0, 0, 0, 0, heads.scale, True)
        parts.append(with_lse(form)(heads.queries, heads.keys, heads.values, *index))
    (left, of_left), (right, of_right) = parts
    assert [round(x[0, 0, 15].item(), 4) for x in (of_left, of_right)] == [6.0181, 5.7140]
    assert (of_right[:, :, :8] == -torch.inf).all()
    out, lse = merged(left, of_left, right, of_right)
    assert round(lse[0, 0, 15].item(), 4) == 6.5707
    torch.testing.assert_close(out, attended(heads), rtol=1e-12, atol=1e-12)


def test_an_empty_part_leaves_the_other_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    out, lse = torch.randn(1, 2, 5, 4, generator=generator), torch.randn(1, 2, 5, generator=generator)
    none, empty = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for found, sums in (merged(out, lse, none, empty), merged(none, empty, out, lse)):
        assert torch.equal(found, out)
        assert torch.equal(sums, lse)
    nothing, sums = merged(none, empty, none, empty)
    assert torch.equal(nothing, none)
    assert torch.equal(sums, empty)


@both
@every_case
def test_what_keys_receive_adds_up_to_the_weights(seed: int, form: str) -> None:
    case, received = drawn_case(seed), with_lse(form, "block_sparse_received")
    weight = torch.rand(case.q.shape[0], case.q.shape[2], generator=torch.Generator().manual_seed(seed))
    _, lse = with_lse("called")(*case.args)
    got = received(case.q, case.k, lse, weight, *case.args[3:])
    logits = logits_of(case)
    shares = logits.softmax(-1).nan_to_num(0.0) * weight[:, None, :, None]
    torch.testing.assert_close(got.double(), shares.sum(2), rtol=1e-4, atol=1e-5)
    read = (logits > -torch.inf).any(-1)
    total = torch.where(read, weight.unsqueeze(1).double(), 0.0).sum(-1)
    torch.testing.assert_close(got.double().sum(-1), total, rtol=1e-5, atol=1e-5)
    alone = received(case.q, case.k, lse, None, *case.args[3:])
    torch.testing.assert_close(alone.double(), logits.softmax(-1).nan_to_num(0.0).sum(2), rtol=1e-4, atol=1e-5)
