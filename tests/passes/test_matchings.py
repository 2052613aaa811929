"""ToMe's kth and random matchings against their card, and the plans of methods that match, token by token."""

from __future__ import annotations

import pytest
import torch
from by_hand import reduced, tokens_by_hand
from matching_oracle import SlowDiffRate, SlowMatching, SlowMCTF, SlowToFu
from oracle import check_plan, reduced_forward
from rewriting import applied, assert_equal_outputs, rewritten, run
from zoo import FAMILIES

from tamis.errors import BadParameter
from tamis.passes import MCTF, DiffRate, ToFu, ToMe
from tamis.rewrite import Pipeline


def test_the_tokens_after_the_last_whole_group_are_a_group():
    """The card's N = 10 and k = 4: the code is left with a sum of 28 of 45, here 8 merges too and 9 is merged into."""
    hidden = torch.arange(10.0).reshape(1, 10, 1)
    angles = torch.tensor([0.0, 1, 50, 2, 51, 52, 99, 53, 98, 100]).deg2rad()  # three bundles: around 3, 7 and 9
    keys = torch.stack([angles.cos(), angles.sin()], 1).reshape(1, 1, 10, 2)
    tokens = tokens_by_hand(ToMe(matching="kth", k=4), hidden, prefix=0, keys=keys)
    plan = ToMe(matching="kth", k=4).plan(tokens)
    check_plan(plan, tokens)
    assert plan.leader.tolist() == [[3, 7, 9]]
    assert plan.slot.tolist() == [[0, 0, 1, 0, 1, 1, 2, 1, 2, 2]]
    means, sizes = reduced(plan, hidden).flatten(), torch.tensor([3.0, 4, 3])
    torch.testing.assert_close(means, torch.tensor([4 / 3, 18 / 4, 23 / 3]))
    assert round(float((means * sizes).sum())) == 45


def test_a_random_draw_merges_as_many_as_asked_and_never_the_prefix():
    generator, method = torch.Generator().manual_seed(0), ToMe(r=9, matching="random")
    hidden, keys = torch.randn(1, 12, 3, generator=generator), torch.randn(1, 2, 12, 3, generator=generator)
    for seed in range(4):
        drawn = ToMe(r=9, matching="random", seed=seed)
        tokens = tokens_by_hand(method, hidden, prefix=2, keys=keys)
        plan = drawn.plan(tokens)
        check_plan(plan, tokens)
        assert plan.out == 3
        assert plan.slot[0].tolist() == [0, 1, *[2] * 10], "one token is left to merge into"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small", {"k": 3, "matching": "kth", "layers": [1]}),
        ("deit_distilled", {"k": 2, "matching": "kth"}),
        ("dinov2_reg4", {"r": 20, "matching": "random", "seed": 3}),
        ("bert", {"k": 4, "matching": "kth", "layers": [0, 2]}),
        ("bert", {"keep_ratio": 0.6, "matching": "random"}),
    ],
)
def test_a_rewritten_model_equals_the_card(name, options):
    family, result = FAMILIES[name], rewritten(name, str(ToMe(**options)))
    inputs = family.inputs(3, seed=3, dtype=torch.float64)
    expected = reduced_forward(family, family.shared(torch.float64), inputs, [SlowMatching(**options)])
    assert len(expected.stream.counts) == len(applied(result)) > 0
    assert_equal_outputs(run(result, inputs), expected.outputs, 1e-5)


PAIRS = {
    "kth": (ToMe(matching="kth", k=3), SlowMatching(matching="kth", k=3)),
    "random": (ToMe(r=4, matching="random"), SlowMatching(r=4, matching="random")),
    "tofu": (ToFu(r=4), SlowToFu(r=4)),
    "diffrate": (
        DiffRate(prune=1, merge=3),
        SlowDiffRate(prune=1, merge=3, dropped=lambda n, _: 1, gone=lambda n, _: 4),
    ),
    "mctf": (MCTF(r=5, t_info=2.0), SlowMCTF(r=5, t_info=2.0)),
    "mctf one way": (MCTF(keep_ratio=0.7, bidirectional=False), SlowMCTF(keep_ratio=0.7, bidirectional=False)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_plans_equal_the_definition_wherever_the_padding_is(name, prefix):
    generator, (method, slow) = torch.Generator().manual_seed(prefix), PAIRS[name]
    for case in range(8):
        count = int(torch.randint(prefix + 7, 24, (1,), generator=generator))
        hidden, keys = (torch.randn(3, *size, generator=generator) for size in ((count, 5), (2, count, 4)))
        real = torch.randint(prefix + 6, count + 1, (3, 1), generator=generator)
        place = torch.rand(3, count, generator=generator).argsort(1).argsort(1)
        sizes = torch.randint(1, 5, (3, count), generator=generator).float()
        state = {"valid": place < real, "sizes": sizes * (place < real)} if case % 2 else {}
        attention = torch.rand(3, 2, count, count, generator=generator)
        tokens = tokens_by_hand(method, hidden, prefix=prefix, keys=keys, attention=attention, **state)
        plan, expected = method.plan(tokens), slow.plan(tokens)
        check_plan(plan, tokens)
        for part in ("slot", "leader", "moved"):
            assert torch.equal(getattr(plan, part), getattr(expected, part)), part
        for part in ("weight", "sizes"):
            torch.testing.assert_close(getattr(plan, part), getattr(expected, part))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tome:r=3,matching=odd", "matching must be one of parity, kth, random, got odd"),
        ("tome:matching=kth", "k must be 2 or more with matching=kth, and left out otherwise, got None"),
        ("tome:r=3,k=2", "k must be 2 or more with matching=kth, and left out otherwise, got 2"),
        ("tome:r=3,k=2,matching=kth", "r or keep_ratio must be left out, got one"),
    ],
)
def test_parameters_that_contradict_each_other(text, message):
    with pytest.raises(BadParameter, match=message):
        Pipeline.parse(text)
