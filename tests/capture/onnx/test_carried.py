"""Nodes without a function in torch: carried through, evaluated by ONNX Runtime, or refused."""

from __future__ import annotations

import logging
import sys
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_graphs import FLOAT, agree, captured, node, numbers, ops, read, run_reference
from opaque_files import MS, unknown
from opaque_graphs import CASES, HERE, RNG, WINDOWS, graph
from torch.export import ExportedProgram

from tamis.capture.onnx import carried
from tamis.capture.onnx.module import OnnxModule
from tamis.errors import TamisError
from tamis.onnx_errors import NodeFailed, UnknownOps
from tamis.opaque import Opaque, opaque_of


def carried_in(program: ExportedProgram) -> list[Opaque]:
    return [one for one in map(opaque_of, program.graph.nodes) if one is not None]


@pytest.mark.parametrize("case", CASES)
def test_a_program_computes_what_onnx_runtime_does(case: str) -> None:
    content, xs = CASES[case]
    program = agree(content, *xs)
    assert len(carried_in(program)) == 1
    (proto,) = [one for one in content.graph.node if one.op_type == carried_in(program)[0].op.split(".")[-1]]
    assert onnx.ModelProto.FromString(carried_in(program)[0].model).graph.node[0] == proto


def test_sizes_follow_from_those_of_the_inputs() -> None:
    program = captured(CASES["windows"][0], HERE[0], dynamic=True)
    value = next(n for n in program.graph.nodes if opaque_of(n) is not None).meta["val"][0]
    batch, length = next(n for n in program.graph.nodes if n.name == "x").meta["val"].shape[:2]
    assert str(value.shape[0]) == str(batch)
    assert value.shape[1].node.expr.free_symbols == length.node.expr.free_symbols
    assert tuple(value.shape[2:]) == (4, 3)


def test_what_follows_from_constants_is_computed_once() -> None:
    nodes = [unknown("CDist", ["w", "w"], ["d"], "distances"), node("MatMul", "x d", "y")]
    program = agree(graph(nodes, 3, w=RNG.standard_normal((4, 4))), *HERE)
    assert ops(program) == ["matmul"]
    assert [tuple(value.shape) for value in program.state_dict.values()] == [(4, 4)]


def test_a_known_operator_asked_for_more_than_its_function_does(caplog: pytest.LogCaptureFixture) -> None:
    """The function knows BatchNormalization by channel alone; here is one of version 7 by place."""
    values = {name: RNG.random((6, 4)) for name in ("scale", "bias", "mean", "var")}
    content = graph([node("BatchNormalization", "x scale bias mean var", "y", spatial=0)], 3, [2, 6, 4], 7, **values)
    with caplog.at_level(logging.WARNING, "tamis"):
        program = agree(content, numbers(2, 6, 4))
    assert [one.op for one in carried_in(program)] == ["BatchNormalization"]
    assert "BatchNormalization at y is left to ONNX Runtime: it has statistics per place" in caplog.text


def test_it_is_said_which_nodes_are_left_to_onnx_runtime(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tamis"):
        OnnxModule(read(CASES["windows"][0]))
    assert "m.onnx: left to ONNX Runtime, on the CPU: com.microsoft.UnfoldTensor at windows" in caplog.text


def test_inside_a_function_and_a_branch() -> None:
    branch = helper.make_graph(
        [helper.make_node("Windows", ["x"], ["w"], domain="own")],
        "branch",
        [],
        [helper.make_tensor_value_info("w", FLOAT, [None] * 4)],
    )
    other = helper.make_graph(
        [node("Unsqueeze", "x three", "u")], "other", [], [helper.make_tensor_value_info("u", FLOAT, [None] * 4)]
    )
    content = graph(
        [
            node("Shape", "x", "sizes"),
            node("Size", "sizes", "axes"),
            node("Equal", "axes third", "long"),
            node("If", "long", "y", then_branch=branch, else_branch=other),
        ],
        4,
        third=3,
        three=[3],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MS, 1)]
    content.functions.append(helper.make_function("own", "Windows", ["x"], ["y"], [WINDOWS], opsets))
    content.opset_import.append(helper.make_opsetid("own", 1))
    program = agree(content, *HERE)
    assert [one.op for one in carried_in(program)] == ["com.microsoft.UnfoldTensor"]


def test_run_without_a_trace() -> None:
    for content, xs in CASES.values():
        for x in xs:
            torch.testing.assert_close(OnnxModule(read(content))(x), run_reference(content, x), rtol=1e-5, atol=1e-6)


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(content: Any, error: type[TamisError]) -> str:
    with pytest.raises(error) as caught:
        captured(content, HERE[0], dynamic=True)
    assert type(caught.value) is error
    return str(caught.value)


def test_every_operator_that_nothing_knows_is_listed() -> None:
    nodes = [
        helper.make_node("Strange", ["x"], ["a"], name="first", domain="own"),
        helper.make_node("Strange", ["a"], ["b"], domain="own"),
        unknown("Trilu", ["b"], ["c"], "not listed"),
        unknown("GroupNorm", ["c", "w", "w"], ["d"], "norm"),
        node("SequenceMap", "d", "y", body=helper.make_graph([], "body", [], [])),
    ]
    assert refused(graph(nodes, 3, w=[1.0] * 4), UnknownOps) == (
        "m.onnx: 3 operator(s) are not known to tamis, and ONNX Runtime cannot evaluate them: "
        "SequenceMap (version 18, it holds a graph) at y; "
        "com.microsoft.GroupNorm (no kernel) at norm; own.Strange (no kernel) at first, b.\n"
        "  hint: put their definitions into the file as functions of standard operators, or export without the "
        "optimisation that made them; docs/onnx_support.md lists what is known."
    )


def test_random_numbers_are_refused() -> None:
    text = refused(graph([node("RandomNormalLike", "x", "r"), node("Add", "x r", "y")], 3), NodeFailed)
    assert text.startswith("m.onnx: node r (RandomNormalLike) cannot be evaluated: it draws random numbers.")
    content = graph([node("RandomNormalLike", "w", "r"), node("Add", "x r", "y")], 3, w=RNG.standard_normal((6, 4)))
    assert "node r (RandomNormalLike) cannot be evaluated: it draws random numbers." in refused(content, NodeFailed)
    text = refused(graph([node("RandomNormal", "", "r", shape=[4]), node("Add", "x r", "y")], 3), NodeFailed)
    assert text.startswith("m.onnx: node r (RandomNormal) cannot be evaluated: it draws random numbers.")


def test_what_onnx_runtime_says_is_said() -> None:
    odd = unknown("UnfoldTensor", ["x"], ["y"], "windows", dim=7, size=3)
    text = refused(graph([odd], 4), NodeFailed)
    assert text.startswith("m.onnx: node windows (UnfoldTensor) cannot be evaluated: ONNX Runtime says: ")
    assert "ONNXRuntimeError" not in text
    odd = unknown("UnfoldTensor", ["w"], ["v"], "windows", dim=7, size=3)
    text = refused(graph([odd, node("Add", "x v", "y")], 4, w=RNG.standard_normal((6, 4))), NodeFailed)
    assert text.startswith("m.onnx: node windows (UnfoldTensor) cannot be evaluated: ONNX Runtime says: ")


def test_types_that_onnx_runtime_does_not_take_are_refused() -> None:
    nodes = [node("Cast", "x", "h", to=TensorProto.BFLOAT16), unknown("Trilu", ["h"], ["u"], "upper")]
    text = refused(graph([*nodes, node("Cast", "u", "y", to=FLOAT)], 3), NodeFailed)
    assert "node upper (Trilu) cannot be evaluated: ONNX Runtime takes no bfloat16 from Python" in text


def test_without_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    carried._kernels.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    text = refused(CASES["windows"][0], UnknownOps)
    assert "com.microsoft.UnfoldTensor (ONNX Runtime is not installed: pip install tamis[cpu]) at windows" in text


def test_only_the_table_counts_where_the_table_is_tested() -> None:
    with pytest.raises(UnknownOps, match=r"UnfoldTensor \(ONNX Runtime is not asked\) at windows"):
        OnnxModule(read(CASES["windows"][0]), carry=False)
