"""Example inputs made for a file, and the names it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import FLOAT, INT64, node

from tamis.capture.onnx.source import Loaded, load_onnx
from tamis.onnx_errors import TypeUnsupported

Shape = list[int | str | None]


def file(
    tmp_path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, Shape | None]], **weights: Any
) -> str:
    """A file with these inputs and weights; its output is y."""
    declared = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()]
    graph = helper.make_graph(
        nodes, "g", declared, [helper.make_tensor_value_info("y", FLOAT, None)], initializer=tensors
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return str(path)


def embedding(tmp_path: Path, ids: int = INT64) -> Loaded:
    nodes = [
        node("Cast", "ids", "wide", to=INT64),
        node("Gather", "table wide", "rows"),
        node("Cast", "mask", "seen", to=FLOAT),
        node("Unsqueeze", "seen last", "column"),
        node("Mul", "rows column", "y"),
    ]
    inputs: dict[str, tuple[int, Shape | None]] = {
        "ids": (ids, ["batch", "past + 1"]),
        "mask": (INT64, ["batch", "past + 1"]),
    }
    path = file(tmp_path, nodes, inputs, table=np.ones((5, 3)))
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array([2]), "last"))
    onnx.save(model, path)
    return load_onnx(path)


@pytest.mark.parametrize("kind", [INT64, TensorProto.INT32])
def test_ids_are_rows_of_the_table_and_masks_are_ones(tmp_path: Path, kind: int) -> None:
    loaded = embedding(tmp_path, kind)
    ids, mask = loaded.args
    assert ids.shape == mask.shape == (2, 16)
    assert set(ids.flatten().tolist()) == {0, 1, 2, 3, 4}
    assert bool((mask == 1).all())
    assert loaded.module(*loaded.args).shape == (2, 16, 3)


def test_dimensions_have_the_files_names(tmp_path: Path) -> None:
    loaded = embedding(tmp_path)
    assert loaded.axes.leaves == ({0: "batch", 1: "past_1"}, {0: "batch", 1: "past_1"})
    assert loaded.interface.dimensions[0] == ((0, "batch"), (1, "past + 1"))
    assert loaded.interface.inputs == ("ids", "mask")
    assert loaded.interface.outputs == ("y",)


def test_fixed_sizes_are_kept_and_nameless_ones_are_dynamic(tmp_path: Path) -> None:
    loaded = load_onnx(file(tmp_path, [node("Neg", "x", "y")], {"x": (FLOAT, [1, None, 3])}))
    assert loaded.args[0].shape == (1, 16, 3)
    assert loaded.axes.leaves == ({1: "x_1"},)


def test_examples_are_the_same_each_time(tmp_path: Path) -> None:
    path = file(tmp_path, [node("Neg", "x", "y")], {"x": (FLOAT, ["b", 3])})
    assert torch.equal(load_onnx(path).args[0], load_onnx(path).args[0])


def test_an_input_without_rank_is_refused(tmp_path: Path) -> None:
    path = file(tmp_path, [node("Neg", "x", "y")], {"x": (FLOAT, None)})
    with pytest.raises(TypeUnsupported, match="input 'x' is of type unknown rank"):
        load_onnx(path)


def test_an_input_with_a_default_is_no_input(tmp_path: Path) -> None:
    path = file(tmp_path, [node("Add", "x w", "y")], {"x": (FLOAT, [2]), "w": (FLOAT, [2])}, w=[1.0, 2.0])
    loaded = load_onnx(path)
    assert loaded.interface.inputs == ("x",)
    assert torch.equal(loaded.module(torch.zeros(2)), torch.tensor([1.0, 2.0]))


def joined(tmp_path: Path, total: str) -> Loaded:
    """past and new tokens joined, times a number for each; `total` is what the file calls how many they are."""
    nodes = [node("Concat", "past new", "all", axis=1), node("Mul", "all weights", "y")]
    inputs: dict[str, tuple[int, Shape | None]] = {
        "new": (FLOAT, ["batch", "sequence"]),
        "weights": (FLOAT, ["batch", total]),
        "past": (FLOAT, ["batch", "past"]),
    }
    return load_onnx(file(tmp_path, nodes, inputs))


@pytest.mark.parametrize("total", ["past + sequence", "past+2*sequence - sequence", "total", "s81"])
def test_a_length_may_be_the_sum_of_others(tmp_path: Path, total: str) -> None:
    loaded = joined(tmp_path, total)
    assert [tuple(x.shape) for x in loaded.args] == [(2, 16), (2, 32), (2, 16)]
    assert loaded.module(*loaded.args).shape == (2, 32)


def test_a_formula_that_is_none_is_a_name(tmp_path: Path) -> None:
    for name in ("past // 0 + sequence", "f(past)", "0 * past", "past +"):
        assert [x.shape[1] for x in joined(tmp_path, name).args] == [16, 32, 16]  # found by trying


def image(tmp_path: Path, rows: int | None) -> Loaded:
    """Patches of 4 pixels, with a position each where there are rows of them; every size is declared dynamic."""
    nodes = [
        node("Conv", "pixels kernel", "grid", strides=[4, 4], group=1),
        node("Flatten", "grid", "patches", axis=2) if rows is None else node("Reshape", "grid flat", "patches"),
        node("Neg", "patches", "y") if rows is None else node("Add", "patches places", "y"),
    ]
    weights = {"kernel": np.ones((5, 3, 4, 4)), "places": np.ones((1, 5, rows or 1))}
    path = file(tmp_path, nodes, {"pixels": (FLOAT, ["batch", "channels", "height", "width"])}, **weights)
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 5, -1]), "flat"))
    onnx.save(model, path)
    return load_onnx(path)


@pytest.mark.parametrize(("rows", "size"), [(49, 28), (400, 80), (16, 16)])
def test_images_may_have_one_size_only(tmp_path: Path, rows: int, size: int, caplog: pytest.LogCaptureFixture) -> None:
    loaded = image(tmp_path, rows)
    assert loaded.args[0].shape == (2, 3, size, size)
    assert loaded.axes.leaves == ({0: "batch"},)
    assert [record.getMessage().partition(": the ")[2] for record in caplog.records] == [
        "channels dimension is static at 3: the model does not work at other sizes",
        f"height dimension is static at {size}: the model does not work at other sizes",
        f"width dimension is static at {size}: the model does not work at other sizes",
    ]


def test_images_of_any_size_stay_so(tmp_path: Path) -> None:
    loaded = image(tmp_path, None)
    assert loaded.args[0].shape == (2, 3, 16, 16)
    assert loaded.axes.leaves == ({0: "batch", 2: "height", 3: "width"},)
