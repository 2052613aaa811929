"""Window pooling against torch's own average pooling, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from by_hand import plan_by_hand, reduced, tokens_by_hand
from oracle import check_plan, reduced_forward
from rewriting import applied, assert_equal_outputs, captured, rewritten, run
from zoo import FAMILIES

from tamis.errors import BadParameter, NothingChanged
from tamis.passes import Pool
from tamis.rewrite import Pipeline
from tamis.tokens import Plan, Tokens


@dataclass(frozen=True)
class ByHand(Pool):
    """Windows listed one by one."""

    def plan(self, tokens: Tokens) -> Plan:
        rows, columns = tokens.grid
        p, first = self.window, tokens.prefix
        windows = [
            [first + (y + i) * columns + x + j for i in range(p) for j in range(p)]
            for y in range(0, rows, p)
            for x in range(0, columns, p)
        ]
        slots = [*([i] for i in range(first)), *windows]
        grid = (rows // p, columns // p)
        return plan_by_hand(tokens, [slots] * tokens.hidden.shape[0], tokens.sizes, spare=False, grid=grid)


def test_the_cards_example():
    x = torch.arange(16.0).reshape(1, 16, 1)
    plan = Pool(window=2).plan(tokens_by_hand(Pool(window=2), x, prefix=0, grid=(4, 4)))
    assert reduced(plan, x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert plan.grid == (2, 2)


@pytest.mark.parametrize("grid", [(6, 6), (4, 12), (12, 2)])
@pytest.mark.parametrize("window", [2, 3, 6])
@pytest.mark.parametrize("prefix", [0, 2])
def test_it_equals_average_pooling(grid, window, prefix):
    if grid[0] % window or grid[1] % window:
        window = 2
    method, (rows, columns) = Pool(window=window), grid
    x = torch.randn(2, prefix + rows * columns, 5, generator=torch.Generator().manual_seed(0))
    tokens = tokens_by_hand(method, x, prefix=prefix, grid=grid)
    plan = method.plan(tokens)
    check_plan(plan, tokens)
    assert torch.equal(plan.moved, ByHand(window=window).plan(tokens).moved)
    image = x[:, prefix:].transpose(1, 2).unflatten(2, grid)
    expected = torch.nn.functional.avg_pool2d(image, window).flatten(2).transpose(1, 2)
    got = reduced(plan, x)
    assert got.shape[1] == prefix + rows * columns // window**2
    assert torch.equal(got[:, :prefix], x[:, :prefix])
    torch.testing.assert_close(got[:, prefix:], expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose(got[:, prefix:].mean(1), x[:, prefix:].mean(1), atol=1e-6)


def test_a_window_that_does_not_divide_the_grid_is_refused():
    tokens = tokens_by_hand(Pool(window=2), torch.zeros(1, 25, 2), prefix=0, grid=(5, 5))
    with pytest.raises(BadParameter) as caught:
        Pool(window=2).why_not_at(tokens)
    assert str(caught.value) == (
        "pool at layer 0: window must be a number that divides the grid of 5 x 5 tokens, one of 1, 5, got 2.\n"
        "  hint: no row or column is left out in silence."
    )
    with pytest.raises(BadParameter, match="grid of 7 x 7 tokens, one of 1, 7, got 2"):
        rewritten("dinov2_reg4", "pool:layers=[0]")


def test_a_grid_with_padding_is_refused():
    whole = tokens_by_hand(Pool(window=2), torch.zeros(1, 16, 2), prefix=0, grid=(4, 4))
    assert Pool(window=2).why_not_at(whole) == ""
    padded = replace(whole, valid=torch.ones(1, 16, dtype=torch.bool))
    assert "may be padding" in Pool(window=2).why_not_at(padded)


MODELS = [
    ("vit_mean", "pool:window=2,layers=[0]", [10]),
    ("vit_mean", "pool:window=3,layers=[1],prop_attn=true", [5]),
    ("vit_mean", "pool:window=2,layers=[0],prop_attn=true + tome:r=3,layers=[1,2]", [10, 7, 4]),
    ("deit_distilled", "pool:window=3,layers=[0] + pool:window=2,layers=[1],prop_attn=true", [6, 3]),
]


@pytest.mark.parametrize(("name", "passes", "counts"), MODELS)
def test_a_rewritten_model_equals_windows_by_hand(name, passes, counts):
    family, result = FAMILIES[name], rewritten(name, passes)
    methods = [
        ByHand(window=one.window, layers=one.layers, prop_attn=one.prop_attn) if isinstance(one, Pool) else one
        for one in Pipeline.parse(passes).passes
    ]
    inputs = family.inputs(3, dtype=torch.float64, seed=2)
    answer = reduced_forward(family, family.shared(torch.float64), inputs, methods)
    assert [after for _, _, after in answer.stream.counts] == counts
    assert_equal_outputs(run(result, inputs), answer.outputs, 1e-5)


def test_registers_stay_and_a_whole_grid_may_become_one_token():
    family, inputs = FAMILIES["dinov2_reg4"], FAMILIES["dinov2_reg4"].inputs(2, dtype=torch.float64)
    result = rewritten("dinov2_reg4", "pool:window=7,layers=[1]")
    answer = reduced_forward(family, family.shared(torch.float64), inputs, [ByHand(window=7, layers=[1])])
    assert answer.stream.counts == [(1, 54, 6)]
    assert_equal_outputs(run(result, inputs), answer.outputs, 1e-5)


def test_by_default_it_shortens_what_leaves_the_encoder():
    inputs = FAMILIES["hf_vit"].inputs(2, dtype=torch.float64)
    dense, _ = run(captured("hf_vit"), inputs)
    short, _ = run(rewritten("hf_vit", "pool:window=3", restore=False), inputs)
    assert (dense.shape[1], short.shape[1]) == (37, 5)
    full, _ = run(rewritten("hf_vit", "pool:window=3"), inputs)
    assert full.shape == dense.shape
    patches = full[:, 1:].unflatten(1, (2, 3, 2, 3))
    assert torch.equal(patches, patches[:, :, :1, :, :1].expand_as(patches))


def test_after_another_reduction_there_is_no_grid():
    result = Pipeline.parse("tome:r=4,layers=[0] + pool:layers=[1,2]").run(captured("vit_mean"), allow_noop=True)
    assert [outcome.layer for outcome in applied(result)] == [0]
    assert "a pass before it left none; put the pool first" in result.outcomes[1].reason
    with pytest.raises(NothingChanged, match="put the pool first"):
        rewritten("vit_mean", "tome:r=4,layers=[0] + pool:layers=[1]")


def test_a_model_without_a_grid_is_refused():
    with pytest.raises(NothingChanged, match="it pools over the grid of patch tokens, and the model has none"):
        rewritten("bert", "pool:layers=[0]")


@pytest.mark.parametrize("amount", [{"r": 3}, {"keep_ratio": 0.25}])
def test_the_window_says_how_many_stay(amount):
    with pytest.raises(BadParameter, match="r or keep_ratio must be left out, got one"):
        Pool(**amount)
    with pytest.raises(BadParameter, match="window must be 1 or more, got 0"):
        Pool(window=0)
