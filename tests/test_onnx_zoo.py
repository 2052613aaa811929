"""ONNX files of the zoo: ONNX Runtime equals torch at other sizes, and other people's tools can read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from rewriting import rewritten
from torch.export import ExportedProgram
from zoo import FAMILIES
from zoo_text import CLIP_TEXT

from tamis.capture import capture
from tamis.lowering.onnx import export_onnx
from tamis.rewrite import Pipeline

METHODS = ["tome:r=3", "evit:keep_ratio=0.6,layers=[0,1]", "random:keep_ratio=0.7,layers=[1]"]
ZOO = ["vit_small", "deit_distilled", "deit3_small", "dinov2_reg4", "hf_vit", "clip_vision", "bert"]
ZOO += ["roberta", "t5_encoder", "modernbert"]
ZOO += ["eva02", "beit", "siglip", "hf_siglip"]
EVERY = ("vit_small", "deit_distilled", "bert")  # one prefix token, two of them, padding
PAIRS = [(name, method) for name in ZOO for method in METHODS if FAMILIES[name].takes(method)]
CASES: list[Any] = [  # every model with one method, every method with these models
    pytest.param(*pair, marks=[] if pair[0] in EVERY or pair[1] == METHODS[0] else [pytest.mark.full]) for pair in PAIRS
]
CASES += [(name, "pitome:keep_ratio=0.8,margin=0.5,bsm=[0]") for name in ("vit_small", "bert")]
CASES += [("bert", "tofu:keep_ratio=0.8,switch=0,layers=[0] + tome:matching=kth,k=3,layers=[1]")]
CASES += [("bert", "diffrate:r=4,layers=[0] + mctf:r=4,layers=[1] + tome:r=2,matching=random,layers=[1]")]
CASES += [(name, "ats:keep_ratio=0.8,layers=[0,1]") for name in ("vit_small", "deit_distilled", "dinov2_reg4", "bert")]
CASES += [("deit_distilled", "pool:window=3,layers=[0]")]
CASES += [("deit_distilled", "random:keep_ratio=0.6,layers=[0,1],draw=stratified,prop_attn=true")]
CASES += [(name, "zero-tprune:keep_ratio=0.7,iterations=5,init=cls") for name in ("deit_distilled", "bert")]
BUDGET = 1e-4


def run_file(path: Path | str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
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


def assert_file_equals(program: ExportedProgram, inputs: list[Any], path: Path) -> set[str]:
    """ONNX Runtime on the file of a program equals the program on each of `inputs`; the tamis functions it calls."""
    export_onnx(program, path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {f.domain for f in model.functions} >= {"tamis"}
    for args, kwargs, feeds in inputs:
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(program.module()(*args, **kwargs))
        assert_equal(run_file(path, feeds), expected)
    return {node.op_type for node in model.graph.node if node.domain == "tamis"}


@pytest.mark.parametrize(("name", "method"), CASES)
def test_onnx_runtime_equals_torch_at_another_batch_and_length(name: str, method: str, tmp_path: Path) -> None:
    program = rewritten(name, method, torch.float32).graph.program
    inputs = [feeds_of(name, batch, length) for batch, length in ((1, 9), (5, 23))]
    called = assert_file_equals(program, inputs, tmp_path / "model.onnx")
    assert called & {
        "BipartiteMatch",
        "BipartiteMatchMasked",
        "EnergyMatch",
        "MergeTokens",
        "SampleTokens",
        "SelectTokens",
        "SelectTokensMasked",
    }


def test_onnx_runtime_equals_torch_under_causal_attention(tmp_path: Path) -> None:
    model = CLIP_TEXT.shared()
    graph = capture(model, (), CLIP_TEXT.inputs(2)[1])
    program = Pipeline.parse("tome:r=3,causal=true").run(graph).graph.program
    inputs = []
    for batch, length, padding in ((1, 9, "right"), (5, 23, "right"), (3, 20, "left")):
        _, kwargs = CLIP_TEXT.inputs(batch, length=length, padding=padding)
        inputs.append(((), kwargs, {key: value.numpy() for key, value in kwargs.items()}))
    called = assert_file_equals(program, inputs, tmp_path / "model.onnx")
    assert called >= {"BipartiteMatchMasked", "OrderSlots", "AttentionMasked"}


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
    functions = [f for f in onnx.load(path).functions if f.name in ("MergeTokens", "MergeTokensSpare")]
    assert functions
    for function in functions:
        scatters = [node for node in function.node if node.op_type.startswith("Scatter")]
        modes = {a.s for node in scatters for a in node.attribute if a.name == "reduction"}
        assert modes == {b"add"}
