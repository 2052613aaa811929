"""MCTF against its card: a product of similarity, inverse attention and inverse size, in both directions."""

from __future__ import annotations

import pytest
import torch
from by_hand import reduced, tokens_by_hand
from matching_oracle import SlowMCTF
from oracle import check_plan, reduced_forward
from rewriting import applied, assert_equal_outputs, rewritten, run
from zoo import FAMILIES

from tamis.errors import BadParameter
from tamis.passes import MCTF
from tamis.rewrite import Pipeline


def tokens_at(angles: list[float], received: list[float], method: MCTF, **state):
    """Unit vectors at these angles behind a class token; every token receives this attention from all."""
    turned = torch.tensor([90.0, *angles]).deg2rad()
    hidden = torch.stack([turned.cos(), turned.sin()], 1).unsqueeze(0)
    attention = torch.tensor([0.1, *received]).expand(1, 1, len(turned), len(turned))
    return tokens_by_hand(method, hidden, attention=attention, **state)


def test_a_worked_example_in_both_directions():
    """b = tokens 1, 3, 5 and a = 2, 4, 6: first 2 merges into 1, then 1 with it into 4, the nearest that is left."""
    method = MCTF(r=2, t_info=0, t_size=0)
    tokens = tokens_at([0, 1, 200, 5, 170, 100], [0.1, 0.3, 0.1, 0.2, 0.1, 0.1], method)
    plan = method.plan(tokens)
    check_plan(plan, tokens)
    assert plan.leader.tolist() == [[0, 4, 6, 5, 3]], "the odd ones by falling worth: 5 is 70 degrees off 6, 3 is 100"
    assert plan.slot.tolist() == [[0, 1, 1, 4, 1, 3, 2]]


@pytest.mark.parametrize(
    ("options", "merged"),
    [
        ({"t_info": 0}, 2),  # 2 is nearer to 3
        ({"t_info": 1.0}, 4),  # but 4 and 3 receive a tenth of the attention
        ({"t_sim": 0, "t_info": 0}, 2),  # no criterion at all: the first
    ],
)
def test_criteria(options, merged):
    method = MCTF(r=1, bidirectional=False, t_size=0, **options)
    tokens = tokens_at([180, 10, 0, 20], [0.3, 0.3, 0.3, 0.03], method)
    assert method.plan(tokens).moved.tolist() == [[merged]]


def test_large_tokens_merge_last_and_means_weigh_by_attention_and_size():
    method = MCTF(r=1, bidirectional=False, t_info=0, t_size=1.0)
    sizes = torch.tensor([[1.0, 1, 8, 2, 2]])
    tokens = tokens_at([180, 1, 0, 20], [0.1, 0.2, 0.1, 0.3], method, sizes=sizes)
    plan = method.plan(tokens)
    assert plan.moved.tolist() == [[4]], "2 is nearer to 3, and four times the size"
    angles = torch.tensor([0.0, 20]).deg2rad()
    pair = torch.stack([angles.cos(), angles.sin()], 1)
    expected = (pair * torch.tensor([[0.1 * 2], [0.3 * 2]])).sum(0) / 0.8
    torch.testing.assert_close(reduced(plan, tokens.hidden)[0, plan.slot[0, 4]], expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small", {"r": 13}),
        ("deit_distilled", {"r": 5, "bidirectional": False}),
        ("dinov2_reg4", {"keep_ratio": 0.8, "t_sim": 2, "t_info": 3.0, "t_size": 2.0}),
        ("bert", {"r": 4, "t_info": 2.0, "t_size": 1.0}),
        ("siglip", {"r": 3}),
    ],
)
def test_a_rewritten_model_equals_the_card(name, options):
    family, result = FAMILIES[name], rewritten(name, str(MCTF(**options)))
    inputs = family.inputs(3, seed=3, dtype=torch.float64)
    expected = reduced_forward(family, family.shared(torch.float64), inputs, [SlowMCTF(**options)])
    assert len(expected.stream.counts) == len(applied(result)) == family.layers
    assert_equal_outputs(run(result, inputs), expected.outputs, 1e-5)


def test_a_temperature_below_zero():
    with pytest.raises(BadParameter, match="t_info must be a number >= 0, got -1"):
        Pipeline.parse("mctf:r=3,t_info=-1")
