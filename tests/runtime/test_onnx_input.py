"""ONNX files in, ONNX files out: names, metadata and weights; see test_exporters for what is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exporter_matrix import assert_close, run_file
from onnx import helper, numpy_helper
from onnx_exports import exported, inputs_of

import tamis
from tamis.capture import capture
from tamis.errors import InputMismatch
from tamis.onnx_errors import ReducedBefore
from tamis.runtime.cli import main
from tamis.runtime.compiled import CompiledModel

# --- the round trip -------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """BERT's file, with metadata, and with dimensions and an output of names that Python does not have."""
    model = onnx.load(exported("bert", "torchscript"))
    helper.set_model_props(model, {"author": "someone", "labels": "[1, 2]"})
    names = {"pooler_output": "pooled.1", "attention_mask": "mask:0"}
    for node in model.graph.node:
        node.input[:] = [names.get(one, one) for one in node.input]
        node.output[:] = [names.get(one, one) for one in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "sequence":
                dim.dim_param = "past + new"
    path = tmp_path / "source.onnx"
    onnx.save(model, path)
    return path


def signature(path: Path) -> list[tuple[str, int, list[Any]]]:
    """Name, type and sizes of all inputs and outputs."""
    graph = onnx.load(path).graph
    return [
        (v.name, v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in (*graph.input, *graph.output)
    ]


def test_a_round_trip_keeps_names_types_metadata_and_numbers(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "same.onnx"
    assert main([str(source), "-o", str(out), "--allow-noop", "--quiet"]) == 0
    before, after = signature(source), signature(out)
    assert after[:2] == before[:2]
    assert [one[:2] for one in after] == [one[:2] for one in before]
    assert after[0] == ("input_ids", onnx.TensorProto.INT64, ["batch", "past + new"])
    assert after[2][2] == ["batch", "past + new", 32]
    props = {one.key: one.value for one in onnx.load(out).metadata_props}
    assert (props["author"], props["labels"]) == ("someone", "[1, 2]")
    inputs = inputs_of("bert", 3, length=12)
    renamed = {"input_ids": inputs["input_ids"], "mask:0": inputs["attention_mask"]}
    assert_close(run_file(out, renamed), run_file(source, renamed))


def test_weights_keep_their_names(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "same.onnx"
    tamis.compile(str(source), passes="tome:r=0", allow_noop=True).export(out)
    before, after = (
        {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer} for path in (source, out)
    )
    kept = [name for name in before if "." in name and name in after]
    assert "model.embeddings.word_embeddings.weight" in kept
    assert all(np.array_equal(before[name], after[name]) for name in kept)


# --- callables ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fast() -> CompiledModel:
    """BERT's file, with tokens merged."""
    return tamis.compile(str(exported("bert", "torchscript")), passes="tome:r=2")


def test_a_compiled_file_is_called_by_the_names_of_its_inputs(fast: CompiledModel) -> None:
    inputs = inputs_of("bert", 3)
    result = fast(**inputs)
    assert list(result) == ["last_hidden_state", "pooler_output"]
    assert torch.equal(result["pooler_output"], fast(*inputs.values())["pooler_output"])
    assert result["last_hidden_state"].shape == (3, 9, 32)


def test_nodes_are_told_by_file_and_name(fast: CompiledModel) -> None:
    assert fast.original is not None
    path = exported("bert", "torchscript")
    for site in fast.original.sites:
        assert site.source.startswith(f"{path}: /model/encoder/layer.")


def test_what_is_saved_is_written_with_the_same_names(tmp_path: Path, fast: CompiledModel) -> None:
    fast.save(tmp_path / "fast.pt2")
    tamis.load(tmp_path / "fast.pt2").export(tmp_path / "fast.onnx")
    assert [one[0] for one in signature(tmp_path / "fast.onnx")] == [
        "input_ids",
        "attention_mask",
        "last_hidden_state",
        "pooler_output",
    ]


def test_the_callers_own_examples_are_taken(fast: CompiledModel) -> None:
    path, inputs = str(exported("bert", "torchscript")), inputs_of("bert", 2, length=12)
    turned = dict(reversed(inputs.items()))
    graph = capture(path, kwargs=turned)
    (args, _) = graph.program.example_inputs
    assert torch.equal(args[0], inputs["input_ids"])
    with pytest.raises(InputMismatch, match=r"hint: its inputs are input_ids, attention_mask\."):
        capture(path, (inputs,), {"odd": args[0]})


def test_what_passes_made_is_not_reduced_again(tmp_path: Path, fast: CompiledModel) -> None:
    fast.export(tmp_path / "once.onnx")
    with pytest.raises(ReducedBefore, match="made by tamis with tome"):
        tamis.compile(str(tmp_path / "once.onnx"), passes="tome:r=1")


def test_the_same_file_has_the_same_recipe_hash(fast: CompiledModel) -> None:
    again = tamis.compile(str(exported("bert", "torchscript")), passes="tome:r=2")
    assert again.recipe.source_hash == fast.recipe.source_hash != ""
    assert again.recipe.weights_hash == fast.recipe.weights_hash


# --- the command ----------------------------------------------------------------------------------------------------


def test_a_bad_file_is_refused_with_nothing_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(exported("bert", "torchscript").read_bytes()[:-5000])
    out = tmp_path / "out.onnx"
    assert main([str(path), "--pass", "tome:r=2", "-o", str(out)]) == 2
    assert not out.exists()
    assert f"error: {path}: cannot be read as an ONNX model: " in capsys.readouterr().err
