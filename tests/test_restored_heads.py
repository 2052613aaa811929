"""Models whose end needs every token of the encoder (a decoder, convolutions over the grid), against oracles.

Merging is undone before them, layer by layer as each value was; pruned tokens pass by if the pass says so, else they
are gone and the model is refused.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from oracle import reduced_forward
from rewriting import applied, run
from zoo_dense import DENSE
from zoo_hf import RESTORED

from tamis.capture import capture
from tamis.errors import TokenAxisUnsupported
from tamis.graph import TokenGraph
from tamis.lowering.onnx import export_onnx
from tamis.rewrite import Pipeline

FAMILIES = {family.name: family for family in (*RESTORED, *DENSE)}


@cache
def captured(name: str) -> TokenGraph:
    args, kwargs = FAMILIES[name].inputs(2, dtype=torch.float64)
    return capture(FAMILIES[name].shared(torch.float64), args, kwargs=kwargs)


PASSING = (
    "random:r=2,passthrough=true",
    "evit:keep_ratio=0.7,fuse=false,passthrough=true",
    "evit:r=3,layers=[0],fuse=false,passthrough=true + tome:r=2,layers=[1] + random:r=1,layers=[2],passthrough=true",
)


FUSED = "evit:keep_ratio=0.7,normalize_fuse=true"  # a mean, which stands for its tokens
MIXED = "random:r=3,layers=[0],passthrough=true + tome:r=2,layers=[1] + random:r=1,layers=[1],passthrough=true"
CASES = [(f.name, p) for f in RESTORED for p in ("tome:r=2", "tome:r=3,layers=[1]", FUSED, *PASSING)]
CASES += [(f.name, p) for f in DENSE for p in ("tome:r=2", MIXED)]


@pytest.mark.parametrize(("name", "passes"), CASES)
def test_every_token_is_back_before_the_head(name: str, passes: str) -> None:
    family, result = FAMILIES[name], Pipeline.parse(passes).run(captured(name))
    assert len(result.graph.layers) == 0  # the result is a program; what was known was known of the original
    assert len(captured(name).layers) == family.layers
    for batch in (1, 3):
        inputs = family.inputs(batch, seed=batch, dtype=torch.float64)
        answer = reduced_forward(family, family.shared(torch.float64), inputs, passes)
        assert answer.stream.counts == [(o.layer, o.before, o.after) for o in applied(result)]
        for mine, expected in zip(run(result, inputs), answer.outputs, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_sees_that_tokens_merged(name: str) -> None:
    inputs = FAMILIES[name].inputs(2, dtype=torch.float64)
    mine, dense = run(Pipeline.parse("tome:r=2").run(captured(name)), inputs), run(captured(name), inputs)
    assert float((mine[0] - dense[0]).abs().max()) > 1e-3


LOST = "evit:r=2,layers=[0],fuse=false + random:r=2,layers=[1],passthrough=true"
GONE = ("random:r=2", "evit:keep_ratio=0.7", "evit:keep_ratio=0.7,fuse=false", LOST)  # a fused sum stands for none


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        *((f.name, p) for f in RESTORED for p in GONE),
        *((f.name, "random:r=2") for f in DENSE if f.name != "detr"),  # whose decoder reads what there is
    ],
)
def test_dropped_tokens_cannot_be_put_back(name: str, passes: str) -> None:
    with pytest.raises(TokenAxisUnsupported, match="dropped some for good"):
        Pipeline.parse(passes).run(captured(name))


@pytest.mark.parametrize(("name", "passes"), [("dpt", PASSING[2]), ("detr", "tome:r=2"), ("yolos", MIXED)])
def test_onnx_runtime_puts_them_back_as_torch_does(name: str, passes: str, tmp_path: Path) -> None:
    args, kwargs = FAMILIES[name].inputs(2)
    program = Pipeline.parse(passes).run(capture(FAMILIES[name].shared(), args, kwargs=kwargs)).graph.program
    export_onnx(program, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        args, kwargs = FAMILIES[name].inputs(batch, seed=batch)
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(program.module()(*args, **kwargs))
        got = session.run(None, {key: value.numpy() for key, value in kwargs.items()})
        for have, want in zip(got, expected, strict=True):
            assert np.linalg.norm(have - want.numpy()) <= 1e-4 * np.linalg.norm(want.numpy())
