"""EViT's options for models that were not trained with it, against plans written out token by token."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from by_hand import plan_by_hand, real_tokens, reduced, tokens_by_hand
from oracle import reduced_forward
from rewriting import assert_equal_outputs, rewritten, run
from zoo import FAMILIES

from tamis.errors import BadParameter
from tamis.passes import EViT
from tamis.tokens import Plan, Tokens

ATTENTION = torch.tensor([0.28, 0.05, 0.30, 0.10, 0.25, 0.02])
X = torch.tensor([[[9.0, 9], [1, 0], [0, 1], [2, 2], [3, -1], [10, 10]]])


@dataclass(frozen=True)
class ByHand(EViT):
    """The card's steps, one row at a time."""

    def plan(self, tokens: Tokens) -> Plan:
        seen, rows = tokens.attention.cls_row().mean(1), []
        weight = torch.ones_like(seen)
        for b, real in enumerate(real_tokens(tokens)):
            ranked = sorted(real[tokens.prefix :], key=lambda i, b=b: (-float(seen[b, i]), i))
            kept = len(ranked) - tokens.rule.removed(len(real))
            fused = ranked[kept:]
            weight[b, fused] = seen[b, fused]
            rows.append([[i] for i in real[: tokens.prefix] + ranked[:kept]] + ([fused] if fused else []))
        return plan_by_hand(tokens, rows, weight, normalize=self.normalize_fuse, counts_sizes=self.fused_size)


@pytest.mark.parametrize(("normalize", "fused"), [(False, (0.25, 0.2)), (True, (3.5714, 2.8571))])
@pytest.mark.parametrize("sized", [False, True])
def test_the_cards_example(normalize, fused, sized):
    method = EViT(keep_ratio=0.5, normalize_fuse=normalize, fused_size=sized)
    plan = method.plan(tokens_by_hand(method, X, attention=ATTENTION.expand(1, 2, 6, 6)))
    out = reduced(plan, X)
    assert out[0, :4].tolist() == [[9, 9], [0, 1], [3, -1], [2, 2]]
    torch.testing.assert_close(out[0, 4], torch.tensor(fused), rtol=0, atol=5e-5)
    assert plan.counts_sizes == sized == method.tracks_sizes


def test_attention_that_underflows_still_makes_a_mean():
    nothing = torch.where(ATTENTION < 0.2, 0.0, ATTENTION).expand(1, 1, 6, 6)
    method = EViT(keep_ratio=0.5, normalize_fuse=True)
    out = reduced(method.plan(tokens_by_hand(method, X, attention=nothing)), X)
    # tokens 1, 3 and 5 score alike: the first is kept, the mean of the others is (6, 6)
    assert out[0, 3].tolist() == [1, 0]
    torch.testing.assert_close(out[0, 4], torch.tensor([6.0, 6]))


BOTH = "normalize_fuse=true,fused_size=true"
MODELS = [("deit_distilled", "normalize_fuse=true"), ("deit_distilled", "fused_size=true")]
MODELS += [(name, BOTH) for name in ("vit_mean", "dinov2_reg4", "bert")]


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_a_rewritten_model_equals_the_plan_by_hand(name, options):
    family, passes = FAMILIES[name], f"evit:keep_ratio=0.6,layers=[0,1],{options}"
    result = rewritten(name, passes)
    inputs = family.inputs(3, dtype=torch.float64, seed=4)
    by_hand = ByHand(
        keep_ratio=0.6, layers=[0, 1], normalize_fuse="normalize" in options, fused_size="fused_size" in options
    )
    answer = reduced_forward(family, family.shared(torch.float64), inputs, [by_hand])
    assert len(answer.stream.counts) == 2
    assert (answer.stream.sizes is not None) == ("fused_size" in options)
    assert_equal_outputs(run(result, inputs), answer.outputs, 1e-5)


@pytest.mark.parametrize("option", ["normalize_fuse", "fused_size"])
def test_options_of_the_fused_token_ask_for_one(option):
    with pytest.raises(BadParameter, match=f"{option} must be false without fuse"):
        EViT(fuse=False, **{option: True})
