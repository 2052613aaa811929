"""Nodes carried through, written to ONNX files: their versions, their constants, and what becomes of names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx_graphs import captured, node, numbers, run_reference
from opaque_files import MS, unknown
from opaque_graphs import CASES, HERE, graph
from torch.export import ExportedProgram

from tamis.errors import ExportFailed
from tamis.lowering.callables import lower
from tamis.lowering.onnx import export_onnx
from tamis.target import Target


def written(program: ExportedProgram, folder: Path, **options: Any) -> onnx.ModelProto:
    return onnx.load(export_onnx(program, folder / "out.onnx", input_names=["x"], output_names=["y"], **options))


def of(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [one for one in model.graph.node if one.op_type == op]


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_file_computes_what_the_original_does(tmp_path: Path, case: str, inline: bool) -> None:
    content, xs = CASES[case]
    model = written(captured(content, xs[0], len(xs) > 1), tmp_path, inline=inline)
    for x in xs:
        torch.testing.assert_close(run_reference(model, x), run_reference(content, x), rtol=1e-5, atol=1e-6)
    op = next(
        one.op_type for one in content.graph.node if one.op_type in ("Unique", "LSTM", "CenterCropPad") or one.domain
    )
    (before,), (after,) = of(content, op), of(model, op)
    assert (after.name, after.domain, after.attribute) == (before.name, before.domain, before.attribute)
    assert [bool(one) for one in after.input] == [bool(one) for one in before.input]
    assert [bool(one) for one in after.output] == [bool(one) for one in before.output]
    assert {one.domain for one in model.opset_import} == {"", *([MS] if before.domain else [])}


def test_constants_go_with_the_node_and_keep_their_names(tmp_path: Path) -> None:
    model = written(captured(CASES["with a small constant"][0], HERE[0], True), tmp_path)
    (upper,) = of(model, "Trilu")
    values = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    assert upper.input[1] == "k"
    assert values["k"] == np.array(1)


def test_two_nodes_with_constants_of_one_name_do_not_share_them(tmp_path: Path) -> None:
    """In a loop the same node has another constant at every step."""
    value = onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph(
        [
            node("Identity", "go", "on"),
            unknown("Trilu", ["sum", "i"], ["upper"], "upper"),
            node("Add", "upper x", "next"),
        ],
        "body",
        [value("i", 7, []), value("go", 9, []), value("sum", 1, None)],
        [value("on", 9, []), value("next", 1, None)],
    )
    content = graph([node("Loop", "trips _ x", "y", body=body)], 3, trips=3)
    program = captured(content, HERE[0], True)
    model = written(program, tmp_path)
    assert len({one.input[1] for one in of(model, "Trilu")}) == 3
    for x in HERE:
        torch.testing.assert_close(run_reference(model, x), run_reference(content, x))


def test_an_old_version_of_a_standard_operator_is_converted(tmp_path: Path) -> None:
    """LRN of version 1 is LRN of 13, with more types; a DFT of version 17 has its axis in an attribute, of 20 not."""
    x = numbers(2, 3, 4, 4)
    content = graph([node("LRN", "x", "y", size=3)], 4, ["b", 3, 4, "n"], 11)
    model = written(captured(content, x), tmp_path)
    assert [one.attribute for one in of(model, "LRN")] == [one.attribute for one in of(content, "LRN")]
    torch.testing.assert_close(run_reference(model, x), run_reference(content, x))


def test_a_version_that_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    values = {name: np.random.default_rng(0).random((6, 4)) for name in ("scale", "bias", "mean", "var")}
    content = graph([node("BatchNormalization", "x scale bias mean var", "y", spatial=0)], 3, [2, 6, 4], 7, **values)
    with pytest.raises(ExportFailed) as caught:
        written(captured(content, numbers(2, 6, 4)), tmp_path)
    assert "node y (BatchNormalization) is of version 7 of the standard operators, and is not in 18" in str(
        caught.value
    )
    assert not list(tmp_path.iterdir())


def test_a_newer_operator_asks_for_a_newer_opset(tmp_path: Path) -> None:
    content = graph([node("GridSample", "x grid", "y", mode="linear")], 4, ["b", 2, 5, 5], 20, grid=GRID)
    x = numbers(2, 2, 5, 5)
    model = written(captured(content, x), tmp_path)
    assert model.opset_import[0].version >= 20
    torch.testing.assert_close(run_reference(model, x), run_reference(content, x))


GRID = np.random.default_rng(0).random((2, 3, 3, 2)) * 2 - 1


def test_a_program_is_written_twice(tmp_path: Path) -> None:
    """The exporter's own symbols for sizes that depend on data must not stay behind."""
    case = "as many as there are different ones"
    program = captured(CASES[case][0], HERE[0], True)
    first = export_onnx(program, tmp_path / "first.onnx")
    second = export_onnx(program, tmp_path / "second.onnx")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("case", ["windows", "as many as there are different ones"])
def test_inductor_calls_them(case: str) -> None:
    content, xs = CASES[case]
    compiled = lower(captured(content, xs[0], True), Target("cpu"), "default")
    for x in xs[:2]:
        torch.testing.assert_close(compiled(x), run_reference(content, x))
