"""Every first method on every first architecture: rewritten graphs equal forwards written by hand."""

from __future__ import annotations

import pytest
import torch
from oracle import reduced_forward
from rewriting import applied, assert_equal_outputs, captured, distance, real_rows, rewritten, run
from zoo import FAMILIES

from tamis.capture import capture
from tamis.graph import module_path, op_name
from tamis.rewrite import Pipeline

MAIN = ("tome:r=6->0", "evit:keep_ratio=0.7", "random:keep_ratio=0.7")
MORE = (
    "tome:r=4",
    "tome:keep_ratio=0.8",
    "tome:r=4,prop_attn=false",
    "pitome:r=5,margin=0.5",
    "pitome:keep_ratio=0.8,energy=paper,bsm=[0]",
    "tofu:keep_ratio=0.8",
    "diffrate:r=5",
    "mctf:keep_ratio=0.8",
    "evit:keep_ratio=0.7,fuse=false",
    "evit:r=5",
    "random:r=3,seed=7",
    "zero-tprune:r=4,iterations=3",
    "ats:keep_ratio=0.8",
    "ats:r=1,points=30,per_head=true",
)
EXTENDED = ("vit_mean", "deit_distilled", "bert")  # mean pooling, two prefix tokens, padding
FLOAT64_BUDGET = 1e-5  # sizes and scores are float32 whatever the model is
CASES = [
    pytest.param(name, passes, marks=[] if passes in MAIN or name in EXTENDED else [pytest.mark.full])
    for name, family in FAMILIES.items()
    for passes in MAIN + MORE
    if family.takes(passes)
]


def expected_outputs(name, passes, inputs, dtype=torch.float64):
    family = FAMILIES[name]
    return reduced_forward(family, family.shared(dtype), inputs, passes)


# Of five images drawn by seed 5 one has two pairs of tokens whose worth differs by 4e-8 of it, less than the float32 in
# which attention's means are known: either may merge.
SEEDS = {("beit", "mctf:keep_ratio=0.8"): 10, ("beitv2", "mctf:keep_ratio=0.8"): 10}


@pytest.mark.parametrize(("name", "passes"), CASES)
def test_a_rewritten_graph_equals_the_oracle_at_batches_1_2_5(name, passes):
    family, result = FAMILIES[name], rewritten(name, passes)
    for batch in (1, 2, 5):
        inputs = family.inputs(batch, seed=SEEDS.get((name, passes), 0) + batch, dtype=torch.float64)
        answer = expected_outputs(name, passes, inputs)
        assert answer.stream.counts, "the oracle reduced nothing, so the comparison would be empty"
        assert_equal_outputs(run(result, inputs), answer.outputs, FLOAT64_BUDGET)
        assert trace(result, family.tokens) == answer.stream.counts


def trace(result, tokens):
    """(layer, before, after) of every reduction, predicted by the rules of the outcomes."""
    counts = []
    for outcome in applied(result):
        after = outcome.rule.out(tokens)
        if isinstance(outcome.before, int):
            assert (outcome.before, outcome.after) == (tokens, after)
        counts.append((outcome.layer, tokens, after))
        tokens = after
    return counts


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "length" not in family.dynamic])
def test_attention_runs_at_the_reduced_length(name):
    """A rewrite that put the full length back before every attention would be right, and save nothing."""
    result, graph, tokens = rewritten(name, MAIN[0]), captured(name), FAMILIES[name].tokens
    counts = trace(result, tokens)
    expected = {
        graph.sites[layer.site].module: min([tokens, *(after for at, _, after in counts if at < layer.index)])
        for layer in graph.layers
    }
    attentions = ("scaled_dot_product_attention", "tamis.attention")
    nodes = [node for node in result.graph.graph.nodes if op_name(node) in attentions and module_path(node) in expected]
    seen = {module_path(node): [arg.meta["val"].shape[2] for arg in node.args[:2]] for node in nodes}
    assert seen == {module: [count, count] for module, count in expected.items()}
    assert min(expected.values()) < tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reduced_output_is_not_the_dense_one(name):
    inputs = FAMILIES[name].inputs(2, dtype=torch.float64)
    for mine, dense in zip(run(rewritten(name, MAIN[0]), inputs), run(captured(name), inputs), strict=True):
        assert distance(mine, dense) > 1e-3


@pytest.mark.parametrize("name", ["vit_mean", "hf_vit", "bert", "eva02", "beit", "hf_siglip"])
def test_an_example_of_batch_1_captures_the_same(name):
    inputs = FAMILIES[name].inputs(3, dtype=torch.float64)
    result = rewritten(name, MAIN[0], batch=1)
    assert_equal_outputs(run(result, inputs), run(rewritten(name, MAIN[0]), inputs), 1e-12)


@pytest.mark.parametrize("name", ["vit_small", "deit_distilled", "bert"])
@pytest.mark.parametrize("passes", [MAIN[0], MAIN[2]])
def test_float32(name, passes):
    inputs = FAMILIES[name].inputs(2)
    answer = expected_outputs(name, passes, inputs, torch.float32)
    assert_equal_outputs(run(rewritten(name, passes, torch.float32), inputs), answer.outputs, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit_mean", "bert"])
def test_half_types(name, dtype):
    """Random drop decides alike in every type, so that only the arithmetic differs."""
    family = FAMILIES[name]
    exact = expected_outputs(name, MAIN[2], family.inputs(2, dtype=torch.float64)).outputs
    got = run(rewritten(name, MAIN[2], dtype), family.inputs(2, dtype=dtype))
    assert all(x.dtype == dtype for x in got)
    assert_equal_outputs(got, exact, 0.1 if dtype == torch.bfloat16 else 0.01)
    merged = run(rewritten(name, MAIN[0], dtype), family.inputs(2, dtype=dtype))
    assert all(x.dtype == dtype and x.isfinite().all() for x in merged)


@pytest.mark.parametrize("name", FAMILIES)
def test_removing_nothing_is_the_identity(name):
    graph, inputs = captured(name), FAMILIES[name].inputs(3, dtype=torch.float64)
    dense = run(graph, inputs)
    for passes in ("tome:r=0", "evit:keep_ratio=1", "evit:keep_ratio=1.0,fuse=false", "random:r=0"):
        result = Pipeline.parse(passes).run(graph, allow_noop=True)
        assert not result.changed
        assert all(torch.equal(a, b) for a, b in zip(run(result, inputs), dense, strict=True))


@pytest.mark.parametrize("name", ["vit_mean", "hf_vit", "bert", "bert_no_mask"])
@pytest.mark.parametrize("passes", MAIN)
def test_neighbours_in_the_batch_do_not_change_a_row(name, passes):
    family, result = FAMILIES[name], rewritten(name, passes)
    alone = run(result, family.inputs(1, dtype=torch.float64))
    together = run(result, family.inputs(5, dtype=torch.float64))
    assert_equal_outputs([x[:1] for x in together], alone, 1e-9)


@pytest.mark.parametrize("passes", [*MAIN, *MORE])
def test_right_padding_does_not_change_a_row(passes):
    family, result = FAMILIES["bert"], rewritten("bert", passes)
    short, long = family.inputs(3), family.inputs(3, extra=9)
    tokens, pooled = run(result, short)
    more_tokens, more_pooled = run(result, long)
    assert_equal_outputs([pooled], [more_pooled], 1e-9)
    for a, b in zip(real_rows(family, short, tokens), real_rows(family, long, more_tokens), strict=True):
        assert distance(a[None], b[None]) <= 1e-9
    assert (more_tokens[:, 24:] == 0).all()


@pytest.mark.parametrize("passes", MAIN)
def test_a_padded_row_equals_the_row_alone_at_its_own_length(passes):
    family, result = FAMILIES["bert"], rewritten("bert", passes)
    inputs = family.inputs(3)
    batch = run(result, inputs)
    for row, real in enumerate((24, 19, 14)):
        alone = {key: value[row : row + 1, :real] for key, value in inputs[1].items()}
        tokens, pooled = run(result, ((), alone))
        assert_equal_outputs([batch[0][row : row + 1, :real], batch[1][row : row + 1]], [tokens, pooled], 1e-9)


LENGTHS = ((1, 41), (3, 13), (2, 7), (2, 2), (1, 1))  # batch, length: at the last ones nothing can leave


@pytest.mark.parametrize("name", ["bert", "bert_no_mask"])
@pytest.mark.parametrize("passes", [*MAIN, "tome:r=4", "tome:keep_ratio=0.97"])
def test_another_sequence_length_than_the_example(name, passes):
    family, result = FAMILIES[name], rewritten(name, passes)
    for batch, length in LENGTHS:
        inputs = family.inputs(batch, length=length, padding="right" if length > 10 else None)
        answer = expected_outputs(name, passes, inputs)
        assert_equal_outputs(run(result, inputs), answer.outputs, FLOAT64_BUDGET)
        if answer.stream.counts:
            assert trace(result, length)[: len(answer.stream.counts)] == answer.stream.counts


@pytest.mark.parametrize("name", ["bert", "bert_no_mask"])
@pytest.mark.parametrize("passes", ["tome:r=3", "evit:r=2", "random:r=1"])
def test_an_example_too_short_to_lose_a_token(name, passes):
    """The graph must not learn from its example that nothing leaves, or that one token does."""
    family = FAMILIES[name]
    model, example = family.shared(torch.float64), family.inputs(2, length=3, padding=None)
    result = Pipeline.parse(passes).run(capture(model, example[0], kwargs=example[1]))
    for batch, length in LENGTHS:
        inputs = family.inputs(batch, length=length, padding=None)
        assert_equal_outputs(run(result, inputs), expected_outputs(name, passes, inputs).outputs, FLOAT64_BUDGET)


def test_a_rewrite_does_not_bind_later_rewrites_of_the_same_graph():
    """Rewrites share the exporter's shape environment: what one of them learned of lengths must not hold for others."""
    family = FAMILIES["bert_no_mask"]
    model, example = family.shared(torch.float64), family.inputs(2)
    graph = capture(model, example[0], kwargs=example[1])
    Pipeline.parse("evit:r=2").run(graph)
    result = Pipeline.parse("tome:r=1").run(graph)
    for length in (24, 41, 2):
        inputs = family.inputs(2, length=length)
        answer = reduced_forward(family, model, inputs, "tome:r=1")
        assert_equal_outputs(run(result, inputs), answer.outputs, FLOAT64_BUDGET)


@pytest.mark.parametrize("passes", MAIN)
def test_left_padding_where_the_model_does_not_know_positions(passes):
    family = FAMILIES["bert"]
    model = family.model(torch.float64)
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.zero_()
    example = family.inputs(2)
    result = Pipeline.parse(passes).run(capture(model, example[0], kwargs=example[1]))
    left, right = family.inputs(3, padding="left"), family.inputs(3, padding="right")
    (left_tokens, left_pooled), (right_tokens, right_pooled) = run(result, left), run(result, right)
    for a, b in zip(real_rows(family, left, left_tokens), real_rows(family, right, right_tokens), strict=True):
        assert distance(a[None], b[None]) <= 1e-9
    # the dense model pools a padding token here; after a reduction the first real token stands first
    assert_equal_outputs([left_pooled], [right_pooled], 1e-9)
    answer = reduced_forward(family, model, left, passes)
    assert_equal_outputs([left_tokens, left_pooled], answer.outputs, FLOAT64_BUDGET)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.without])
def test_a_method_that_does_not_fit_says_why(name):
    for method in FAMILIES[name].without:
        result = Pipeline.parse(f"{method}:keep_ratio=0.7").run(captured(name), allow_noop=True)
        assert not result.changed
        assert "class token" in result.outcomes[0].reason


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("passes", ["tome:r=2", "tome:r=(4,-1)", "evit", "random:keep_ratio=0.7"])
def test_twelve_layers(name, passes):
    family = FAMILIES[name]
    if not family.takes(passes):
        pytest.skip(f"{name} does not take {passes}")
    model = family.model(torch.float64, layers=12)
    args, kwargs = family.inputs(2, dtype=torch.float64)
    result = Pipeline.parse(passes).run(capture(model, args, kwargs=kwargs))
    for batch in (1, 5):
        inputs = family.inputs(batch, seed=batch, dtype=torch.float64)
        answer = reduced_forward(family, model, inputs, passes)
        assert_equal_outputs(run(result, inputs), answer.outputs, FLOAT64_BUDGET)
