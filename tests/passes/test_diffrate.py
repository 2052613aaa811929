"""DiffRate against its card: the last by attention dropped, the next ones merged into the first."""

from __future__ import annotations

import pytest
import torch
from by_hand import reduced, tokens_by_hand
from matching_oracle import SlowDiffRate
from oracle import check_plan, reduced_forward
from rewriting import applied, assert_equal_outputs, captured, rewritten, run
from zoo import FAMILIES

from tamis.errors import BadParameter, TooManyRemoved
from tamis.passes import DiffRate
from tamis.rewrite import Pipeline


def attention_of(row: list[float]) -> torch.Tensor:
    """[1, 1, N, N] whose class token attends as `row`."""
    return torch.tensor(row).expand(1, 1, len(row), len(row))


def test_a_worked_example():
    """Attention ranks 3, 1, 4, 2, 5: 5 is dropped, 4 and 2 merge into 3 or 1, whichever direction is nearer."""
    hidden = torch.tensor([[[9.0, 9], [2, 0], [0, 3], [0, 1], [4, 3], [-5, 5]]])
    method = DiffRate(prune=1, merge=2)
    attention = attention_of([0.1, 0.2, 0.12, 0.3, 0.18, 0.1])
    tokens = tokens_by_hand(method, hidden, attention=attention, sizes=torch.tensor([[1.0, 2, 5, 1, 3, 1]]))
    plan = method.plan(tokens)
    check_plan(plan, tokens)
    assert plan.leader.tolist() == [[0, 3, 1]]
    assert plan.slot.tolist() == [[0, 2, 1, 1, 2, -1]]
    assert reduced(plan, hidden).tolist() == [[[9, 9], [0, 2], [3, 1.5]]], "plain means"
    torch.testing.assert_close(plan.sizes, torch.tensor([[1.0, 1 + 5 * 1.0, 2 + 3 * 0.8]]))


def test_a_token_that_is_opposite_adds_nothing_to_the_size():
    """The code's evaluation multiplies the size by a similarity of -1, and the log of 1 - 2 is no number."""
    hidden = torch.tensor([[[1.0, 0], [1, 0], [-1, 0]]])
    method = DiffRate(r=1, prune_share=0.0)
    tokens = tokens_by_hand(method, hidden, attention=attention_of([0.2, 0.5, 0.3]), sizes=torch.tensor([[1.0, 1, 2]]))
    assert method.plan(tokens).sizes.tolist() == [[1, 1]]


def test_equal_attention_ranks_by_position():
    hidden = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    method = DiffRate(r=3, prune_share=0.34)
    tokens = tokens_by_hand(method, hidden, attention=torch.full((2, 2, 7, 7), 1 / 7))
    plan = method.plan(tokens)
    assert plan.leader.tolist() == [[0, 1, 2, 3]] * 2
    assert (plan.slot[:, 6] == -1).all()
    assert (plan.slot[:, :6] >= 0).all()


@pytest.mark.parametrize(
    ("name", "options", "dropped", "gone"),
    [
        ("vit_small", {"prune": [9, 0], "merge": "6->20"}, lambda n, i: (9, 0)[i], lambda n, i: (15, 20)[i]),
        ("deit_distilled", {"r": 5}, lambda n, i: 2, lambda n, i: 5),
        ("dinov2_reg4", {"keep_ratio": 0.8}, lambda n, i: (n - 5) * 1 // 10, lambda n, i: (n - 5) * 2 // 10),
        (
            "bert",
            {"keep_ratio": 0.7, "prune_share": 0.2},
            lambda n, i: (n - 1) * 6 // 100,
            lambda n, i: (n - 1) * 3 // 10,
        ),
        ("bert", {"merge": {1: 3}, "prune": {1: 2, 2: 1}}, lambda n, i: (0, 2, 1)[i], lambda n, i: (0, 5, 1)[i]),
    ],
)
def test_a_rewritten_model_equals_the_card(name, options, dropped, gone):
    family, method = FAMILIES[name], DiffRate(**options)
    result = rewritten(name, str(method))
    inputs = family.inputs(3, seed=3, dtype=torch.float64)
    slow = SlowDiffRate(**options, dropped=dropped, gone=gone)
    expected = reduced_forward(family, family.shared(torch.float64), inputs, [slow])
    assert len(expected.stream.counts) == len(applied(result)) > 0
    assert_equal_outputs(run(result, inputs), expected.outputs, 1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("diffrate:r=3,prune=2", "r or keep_ratio must be left out, got one"),
        ("diffrate", "r or keep_ratio must be given, one of them, got neither"),
        ("diffrate:prune=1.5", "prune must be whole numbers >= 0, got 1.5"),
        ("diffrate:r=3,prune_share=2", "prune_share must be between 0 and 1, got 2"),
    ],
)
def test_parameters_that_cannot_be_meant(text, message):
    with pytest.raises(BadParameter, match=message):
        Pipeline.parse(text)


def test_more_than_there_are_is_an_error():
    with pytest.raises(TooManyRemoved, match="r=60 tokens cannot be removed from 37"):
        Pipeline.parse("diffrate:prune=20,merge=40").run(captured("vit_mean"))
