"""ToFu against its card: drop in early layers, merge at the largest norm in later ones."""

from __future__ import annotations

import pytest
import torch
from matching_oracle import SlowToFu
from oracle import reduced_forward
from rewriting import applied, assert_equal_outputs, captured, rewritten, run
from zoo import FAMILIES

from tamis.counts import HALF, CountRule, at_most
from tamis.errors import BadParameter
from tamis.graph import op_name
from tamis.kernels.bipartite_match import reference as match
from tamis.kernels.merge_tokens import reference as merge
from tamis.kernels.rescale_tokens import reference as rescale
from tamis.passes import ToFu
from tamis.passes.stream_state import StreamState
from tamis.rewrite import Pipeline
from tamis.tokens import Plan


def test_the_worked_example_of_the_card():
    """(3, 0) and (0, 4): the mean (1.5, 2) has norm 2.5 and becomes (2.4, 3.2); PiToMe's port leaves it as it is."""
    x = torch.tensor([[[3.0, 0], [0, 4]]])
    slot, leader, moved = torch.tensor([[0, 0]]), torch.tensor([[1]]), torch.tensor([[0]])
    mean, _ = merge(x, slot, leader, moved, None, False)
    assert mean.tolist() == [[[1.5, 2]]]
    torch.testing.assert_close(rescale(mean, x, slot, leader, moved), torch.tensor([[[2.4, 3.2]]]))


def test_a_mean_of_zero_has_no_direction_and_stays():
    x = torch.tensor([[[3.0, 4], [-3, -4], [1, 1]]])
    slot, leader, moved = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 2]]), torch.tensor([[1]])
    mean, _ = merge(x, slot, leader, moved, None, False)
    assert rescale(mean, x, slot, leader, moved).tolist() == [[[0, 0], [1, 1]]]


def test_merged_tokens_have_the_largest_norm_of_their_group_and_the_direction_of_its_mean():
    generator = torch.Generator().manual_seed(0)
    x, keys = torch.randn(3, 21, 6, generator=generator), torch.randn(3, 21, 4, generator=generator)
    sizes = torch.randint(1, 5, (3, 21), generator=generator).float()
    rule = CountRule(1, (at_most(9), HALF))
    slot, leader, moved = match(keys, None, rule.out(21), 1, rule.flat())
    mean, _ = merge(x, slot, leader, moved, sizes, False)
    got = rescale(mean, x, slot, leader, moved)
    shared = 0
    for b in range(3):
        for j in range(rule.out(21)):
            group = x[b, slot[b] == j]
            if len(group) == 1:
                assert torch.equal(got[b, j], group[0])
                continue
            shared += 1
            torch.testing.assert_close(got[b, j].norm(), group.norm(dim=-1).max())
            torch.testing.assert_close(got[b, j] / got[b, j].norm(), mean[b, j] / mean[b, j].norm())
    assert shared >= 3


def test_a_prune_layer_leaves_survivors_and_sizes_as_they_are():
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    state = StreamState(2, 6, None, x.device)
    pair = torch.tensor([[0, 1, 2, 3, 4, 4]]).expand(2, -1)
    merging = Plan(pair, torch.tensor([[0, 1, 2, 3, 4]]).expand(2, -1), 5, torch.tensor([[5]]).expand(2, -1))
    y = state.advance(x, merging, size_bias=True)
    slot, leader = torch.tensor([[0, -1, 1, 2, 3]]).expand(2, -1), torch.tensor([[0, 2, 3, 4]]).expand(2, -1)
    z = state.advance(y, Plan(slot, leader, 4, counts_sizes=False, drops=True), size_bias=True)
    assert torch.equal(z, y[:, [0, 2, 3, 4]])
    assert state.sizes.tolist() == [[1, 1, 1, 2]] * 2


@pytest.mark.parametrize("name", ["vit_small", "deit_distilled", "dinov2_reg4", "bert"])
@pytest.mark.parametrize("options", [{"r": 4}, {"keep_ratio": 0.8, "switch": 0}])
def test_a_rewritten_model_equals_the_card(name, options):
    family, method = FAMILIES[name], ToFu(**options)
    result = rewritten(name, str(method))
    inputs = family.inputs(3, seed=3, dtype=torch.float64)
    expected = reduced_forward(family, family.shared(torch.float64), inputs, [SlowToFu(**options)])
    assert len(expected.stream.counts) == len(applied(result)) == family.layers
    assert_equal_outputs(run(result, inputs), expected.outputs, 1e-5)


@pytest.mark.parametrize(("switch", "merging"), [("", 2), (",switch=0", 3), (",switch=2", 1), (",switch=3", 0)])
def test_layers_merge_from_the_switch_on(switch, merging):
    graph = Pipeline.parse(f"tofu:r=3{switch}").run(captured("vit_mean")).graph.graph
    assert [op_name(node) for node in graph.nodes].count("tamis.rescale_tokens") == merging


def test_a_switch_that_is_no_layer():
    for switch, said in (("half", "a whole number, got 'half'"), ("-1", "a whole number >= 0, got -1")):
        with pytest.raises(BadParameter, match=f"switch must be {said}"):
            Pipeline.parse(f"tofu:r=3,switch={switch}")
