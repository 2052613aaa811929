from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rewriting import rewritten, run
from zoo import FAMILIES

from tamis.lowering.inline import inline_ops


def names(program):
    return [node.target._schema.name for node in program.graph.nodes if hasattr(node.target, "_schema")]


@pytest.mark.parametrize("weighted", [True, False])
def test_inlined_program_computes_the_same(program, make_program, make_tokens, weighted):
    program = make_program(weighted=weighted)
    inlined = inline_ops(program)
    for batch in (1, 2, 5):
        given = make_tokens(batch)
        expected, got = program.module()(given), inlined.module()(given)
        assert got.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(got[key], expected[key], rtol=0, atol=0)


def test_no_tamis_op_remains_and_whole_nodes_stay(program):
    inlined = inline_ops(program)
    before, after = names(program), names(inlined)
    assert "tamis::toy_take" in before
    assert not any(name.startswith("tamis::") for name in after)
    for whole in ("scaled_dot_product_attention", "layer_norm", "linear", "gelu"):
        assert after.count(f"aten::{whole}") == before.count(f"aten::{whole}") == 2
    assert inlined.state_dict.keys() == program.state_dict.keys()


def test_the_given_program_is_left_alone(program):
    before = str(program.graph)
    inline_ops(program)
    assert str(program.graph) == before


def test_a_program_without_ops_is_returned_as_it_is(program):
    inlined = inline_ops(program)
    assert inline_ops(inlined) is inlined


def test_inlined_nodes_point_to_the_users_line(program):
    inlined = inline_ops(program)
    multiplied = next(n for n in inlined.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    assert "conftest.py" in multiplied.meta["stack_trace"]


def test_dynamic_length_runs_at_other_lengths(make_program, make_tokens):
    program = make_program(length=True)
    inlined = inline_ops(program)
    for length in (13, 12, 20):
        given = make_tokens(3, length)
        expected, got = program.module()(given), inlined.module()(given)
        torch.testing.assert_close(got["last_hidden_state"], expected["last_hidden_state"], rtol=0, atol=0)
        assert got["last_hidden_state"].shape[1] == length - 4


def test_two_inputs_of_one_shape_stay_two():
    """Where half of the tokens merge, the lists of those that lead and of those that move are equally long."""
    result = rewritten("hf_siglip", "tome:r=8,layers=[0]", torch.float32)
    args, kwargs = FAMILIES["hf_siglip"].inputs(3)
    expected, got = (run(one, (args, kwargs)) for one in (result, replace(result, graph=inlined(result.graph))))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def inlined(graph):
    return graph.with_program(inline_ops(inline_ops(graph.program, called={"merge_tokens"})))
