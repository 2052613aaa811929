"""ONNX files of the zoo: ONNX Runtime equals torch at other sizes, and other people's tools can read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from rewriting import rewritten
from zoo import FAMILIES

from tamis.lowering.onnx import export_onnx

METHODS = ["tome:r=3", "evit:keep_ratio=0.6,layers=[0,1]", "random:keep_ratio=0.7,layers=[1]"]
ZOO = ["vit_small", "deit_distilled", "deit3_small", "dinov2_reg4", "hf_vit", "clip_vision", "bert"]
BUDGET = 1e-4


def run_file(path: Path | str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
ZOO += ["roberta", "t5_encoder", "modernbert"]
ZOO += ["eva02", "beit", "siglip", "hf_siglip"]
CASES = [(name, method) for name in ZOO for method in METHODS if FAMILIES[name].takes(method)]
    names = [given.name for given in session.get_inputs()]
    return session.run(None, {name: feeds[name] for name in names})


def feeds_of(name: str, batch: int, length: int | None) -> tuple[tuple, dict, dict[str, np.ndarray]]:
    """Inputs at sizes the example did not have, for torch and for ONNX Runtime."""
    family = FAMILIES[name]
    args, kwargs = family.inputs(batch, length=length, padding="right") if family.padded else family.inputs(batch)
    graph = rewritten(name, METHODS[0], torch.float32).graph
    values = dict(zip(graph.program.graph_signature.user_inputs, [*args, *kwargs.values()], strict=True))
    return args, kwargs, {key: value.numpy() for key, value in values.items()}


def assert_equal(got: list[np.ndarray], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    for have, want in zip(got, expected, strict=True):
        want = want.numpy()
        assert np.linalg.norm(have - want) <= BUDGET * np.linalg.norm(want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ZOO)
def test_onnx_runtime_equals_torch_at_another_batch_and_length(name: str, method: str, tmp_path: Path) -> None:
    program = rewritten(name, method, torch.float32).graph.program
    path = tmp_path / "model.onnx"
    export_onnx(program, path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {f.domain for f in model.functions} >= {"tamis"}
    called = {node.op_type for node in model.graph.node if node.domain == "tamis"}
    assert called & {"BipartiteMatch", "BipartiteMatchMasked", "SelectTokens", "SelectTokensMasked"}
    for batch, length in ((1, 9), (5, 23)):
        args, kwargs, feeds = feeds_of(name, batch, length)
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(program.module()(*args, **kwargs))
        assert_equal(run_file(path, feeds), expected)


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("name", ["vit_small", "bert"])
def test_files_survive_onnxslim_and_onnxsim(name: str, inline: bool, tmp_path: Path) -> None:
    onnxslim, onnxsim = pytest.importorskip("onnxslim"), pytest.importorskip("onnxsim")
    program = rewritten(name, METHODS[0], torch.float32).graph.program
    path = tmp_path / "model.onnx"
    export_onnx(program, path, inline=inline)
    assert bool(onnx.load(path).functions) is not inline
    args, kwargs, feeds = feeds_of(name, 3, 14)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(program.module()(*args, **kwargs))
    slim, simple = tmp_path / "slim.onnx", tmp_path / "simple.onnx"
    onnx.save(onnxslim.slim(str(path)), slim)
    simplified, done = onnxsim.simplify(onnx.load(path), check_n=0)
    assert done
    onnx.save(simplified, simple)
    for file in (slim, simple):
        assert_equal(run_file(file, feeds), expected)


def test_a_merge_never_becomes_an_overwriting_scatter(tmp_path: Path) -> None:
    """ScatterElements without reduction overwrites; what sums must say `add` (users.md 2.0c)."""
    path = tmp_path / "model.onnx"
    export_onnx(rewritten("vit_small", METHODS[0], torch.float32).graph.program, path)
    functions = [f for f in onnx.load(path).functions if f.name in ("MergeTokens", "SumTokens")]
    assert functions
    for function in functions:
        scatters = [node for node in function.node if node.op_type.startswith("Scatter")]
        modes = {a.s for node in scatters for a in node.attribute if a.name == "reduction"}
        assert modes == {b"add"}
