"""What holds for every input: mass, protection, survivors, restoration, composition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import apply_plan, check_plan, one_hot, reduced_forward
from rewriting import applied, assert_equal_outputs, captured, distance, rewritten, run
from zoo import FAMILIES

from tamis.passes import EViT, RandomDrop, ToMe
from tamis.tokens import Attention, Tokens

MERGING = st.builds(ToMe, r=st.integers(1, 12)) | st.builds(ToMe, keep_ratio=st.sampled_from([0.3, 0.5, 0.7, 0.9]))
RATIO = st.sampled_from([0.1, 0.34, 0.5, 0.7, 0.95])
PRUNING = st.builds(EViT, keep_ratio=RATIO, fuse=st.just(False)) | st.builds(RandomDrop, keep_ratio=RATIO)
FUSING = st.builds(EViT, keep_ratio=RATIO) | st.builds(EViT, r=st.integers(1, 9))
FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def streams(draw: st.DrawFn, prefixes: st.SearchStrategy[int]) -> dict:
    """A batch of token rows: shapes, padding amounts and side, sizes, and a seed for the numbers."""
    prefix = draw(prefixes)
    count = draw(st.integers(prefix + 1, 20))
    batch = draw(st.integers(1, 3))
    padding = draw(st.none() | st.lists(st.integers(0, count - prefix - 1), min_size=batch, max_size=batch))
    return {
        "prefix": prefix,
        "count": count,
        "batch": batch,
        "padding": padding,
        "left": draw(st.booleans()),
        "sized": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }


def tokens_for(method, stream) -> Tokens:
    """The stream as `method` would see it in the only layer of a model."""
    generator = torch.Generator().manual_seed(stream["seed"])
    batch, count = stream["batch"], stream["count"]
    hidden = torch.randn(batch, count, 4, generator=generator, dtype=torch.float64)
    keys = torch.randn(batch, 2, count, 3, generator=generator)
    valid = None
    if stream["padding"] is not None:
        place = torch.arange(count).expand(batch, -1)
        missing = torch.tensor(stream["padding"])[:, None]
        valid = place >= missing if stream["left"] else place < count - missing
    sizes = torch.randint(1, 5, (batch, count), generator=generator).float() if stream["sized"] else None
    sizes = sizes * valid if sizes is not None and valid is not None else sizes
    rule = method.rule(0, 1, stream["prefix"])
    ranks = torch.arange(count).expand(batch, -1) if valid is None else (valid.long().cumsum(1) - 1).clamp(min=0)
    first = torch.zeros(batch, dtype=torch.long) if valid is None else valid.int().argmax(1)
    bias = torch.zeros(batch, count) if valid is None else torch.zeros(batch, count).masked_fill(~valid, -torch.inf)
    return Tokens(
        hidden=hidden,
        rule=rule,
        out=rule.out(count),
        prefix=stream["prefix"],
        layer=0,
        layers=1,
        sizes=sizes,
        valid=valid,
        _tensors={"keys": lambda: keys, "positions": lambda: ranks},
        _attention=lambda: Attention(lambda: class_row(keys, first, bias), *[no_statistic] * 3),
    )


def no_statistic(*_):
    raise NotImplementedError("no method here asks for it")


def class_row(keys, first, bias):
    """Attention of each row's first real token [B, H, N], queries being the keys."""
    query = keys[torch.arange(keys.shape[0]), :, first].unsqueeze(2)
    return (query @ keys.transpose(-1, -2) + bias[:, None, None]).softmax(-1)[:, :, 0]


def reduced(plan, x):
    """The plan applied by the op that rewritten graphs call."""
    return torch.ops.tamis.reduce_tokens(x, plan.slot, plan.leader, plan.moved, plan.weight, plan.normalize)


@FEW
@given(MERGING | PRUNING | FUSING, streams(st.integers(1, 3)))
def test_every_plan_keeps_its_promises_and_the_op_applies_it_as_defined(method, stream):
    tokens = tokens_for(method, stream)
    plan = method.plan(tokens)
    check_plan(plan, tokens)
    got, expected = reduced(plan, tokens.hidden), apply_plan(plan, tokens.hidden)
    real = torch.ones_like(got[..., 0]).bool() if plan.valid is None else plan.valid
    assert torch.allclose(got[real], expected[real], rtol=1e-6, atol=1e-6)


@FEW
@given(MERGING, streams(st.integers(0, 3)))
def test_merging_conserves_mass(method, stream):
    tokens = tokens_for(method, stream)
    plan = method.plan(tokens)
    real = torch.ones(plan.slot.shape).bool() if tokens.valid is None else tokens.valid
    before = tokens.sizes if tokens.sizes is not None else real.float()
    after = torch.einsum("bsn,bn->bs", one_hot(plan).float(), before)
    assert torch.equal(after.sum(1), before.sum(1))
    weighted = (reduced(plan, tokens.hidden) * torch.where(after > 0, after, 0)[..., None]).nan_to_num()
    mass = (tokens.hidden * before[..., None]).sum(1)
    assert torch.allclose(weighted.sum(1), mass, rtol=1e-6, atol=1e-5)


@FEW
@given(MERGING | PRUNING | FUSING, streams(st.integers(1, 3)))
def test_prefix_tokens_are_bitwise_unchanged_and_stay_in_front(method, stream):
    tokens = tokens_for(method, stream)
    got = reduced(method.plan(tokens), tokens.hidden)
    for b in range(stream["batch"]):
        first = 0 if tokens.valid is None else int(tokens.valid[b].int().argmax())
        protected = tokens.hidden[b, first : first + stream["prefix"]]
        assert torch.equal(got[b, : stream["prefix"]], protected)


@FEW
@given(PRUNING | FUSING, streams(st.integers(1, 3)))
def test_survivors_of_pruning_are_bitwise_equal(method, stream):
    tokens = tokens_for(method, stream)
    plan = method.plan(tokens)
    got = reduced(plan, tokens.hidden)
    alone = one_hot(plan).sum(-1) == 1  # a fused token of one is weighed by its attention
    for b, s in alone.nonzero().tolist():
        count = stream["count"] if tokens.valid is None else int(tokens.valid[b].sum())
        fused = tokens.rule.added and tokens.rule.removed(count) > 0 and s == tokens.rule.out(count) - 1
        if not fused:
            assert torch.equal(got[b, s], tokens.hidden[b, plan.leader[b, s]])


@FEW
@given(PRUNING | FUSING, streams(st.integers(1, 3)))
def test_kept_tokens_are_those_of_highest_score(method, stream):
    tokens = tokens_for(method, stream)
    if isinstance(method, RandomDrop):
        from tamis.kernels.hash_scores import hash_scores

        scores = hash_scores(tokens.positions, method.seed, 0).double()
    else:
        scores = tokens.attention.cls_row().mean(1).double()
    plan = method.plan(tokens)
    for b in range(stream["batch"]):
        real = torch.arange(stream["count"]) if tokens.valid is None else tokens.valid[b].nonzero().flatten()
        free = real[stream["prefix"] :]
        removed = tokens.rule.removed(len(real))
        kept = free[scores[b, free].argsort(descending=True, stable=True)][: len(free) - removed]
        slots = plan.slot[b, kept]
        if isinstance(method, EViT):  # by falling score; the draw keeps the original order
            expected = torch.arange(stream["prefix"], stream["prefix"] + len(kept))
            assert torch.equal(slots, expected)
        else:
            assert torch.equal(plan.slot[b, kept.sort().values].sort().values, plan.slot[b, kept.sort().values])
            assert (slots >= 0).all()
            assert int((plan.slot[b, real] >= 0).sum()) == len(real) - removed


@pytest.mark.parametrize("passes", ["tome:r=6->0", "random:keep_ratio=0.6", "tome:r=4,layers=[0] + evit:layers=[1]"])
@pytest.mark.parametrize("name", ["hf_vit", "bert"])
def test_restored_outputs_are_constant_on_groups_and_the_token_map_says_which(name, passes):
    inputs = FAMILIES[name].inputs(3, dtype=torch.float64)
    result = rewritten(name, passes, token_map=True)
    with torch.no_grad():
        outputs, source = result.graph.program.module()(*inputs[0], **inputs[1])
    answer = reduced_forward(FAMILIES[name], FAMILIES[name].shared(torch.float64), inputs, passes)
    assert torch.equal(source, answer.stream.source)
    assert source.dtype == torch.int64
    tokens = outputs.last_hidden_state
    assert_equal_outputs([tokens, outputs.pooler_output], answer.outputs, 1e-5)
    for row, slots in zip(tokens, source, strict=True):
        for slot in slots.unique().tolist():
            members = row[slots == slot]
            assert torch.equal(members, members[:1].expand_as(members))
        assert (row[slots == -1] == 0).all()


def test_restore_false_keeps_outputs_short():
    inputs = FAMILIES["hf_vit"].inputs(2, dtype=torch.float64)
    short, _ = run(rewritten("hf_vit", "tome:r=4", restore=False), inputs)
    full, _ = run(rewritten("hf_vit", "tome:r=4"), inputs)
    assert (short.shape[1], full.shape[1]) == (37 - 3 * 4, 37)


@pytest.mark.parametrize("name", ["vit_mean", "deit_distilled", "hf_vit", "bert"])
@pytest.mark.parametrize(
    "passes",
    [
        "tome:r=4,layers=[0] + evit:keep_ratio=0.6,layers=[1]",
        "evit:keep_ratio=0.6,layers=[0] + tome:r=3,layers=[1,2]",
        "tome:r=3,layers=[0,2] + random:keep_ratio=0.8,layers=[1]",
        "tome:r=3,prop_attn=false,layers=[0] + tome:r=3,layers=[2]",
    ],
)
def test_two_methods_in_one_recipe_compose(name, passes):
    inputs = FAMILIES[name].inputs(3, dtype=torch.float64)
    result = rewritten(name, passes)
    answer = reduced_forward(FAMILIES[name], FAMILIES[name].shared(torch.float64), inputs, passes)
    assert_equal_outputs(run(result, inputs), answer.outputs, 1e-5)
    assert [o.layer for o in applied(result)] == [layer for layer, _, _ in answer.stream.counts]


def test_symbolic_counts_compute_the_same():
    inputs = FAMILIES["hf_vit"].inputs(3, dtype=torch.float64)
    plain, symbolic = rewritten("hf_vit", "tome:r=4"), rewritten("hf_vit", "tome:r=4", symbolic_counts=True)
    for a, b in zip(run(plain, inputs), run(symbolic, inputs), strict=True):
        assert distance(a, b) <= 1e-12


def test_the_graph_that_was_given_is_not_changed():
    graph = captured("hf_vit")
    before = graph.text()
    rewritten("hf_vit", "tome:r=4")
    assert graph.text() == before
