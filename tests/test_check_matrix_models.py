"""The check matrix in a model: every registered token reduction on a small DeiT with a distillation token.

What the methods decide on plain tensors is in `test_check_matrix.py`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from check_streams import made, reductions
from oracle import reduced_forward
from rewriting import applied, assert_equal_outputs, captured, distance, run
from zoo import FAMILIES

from tamis.lowering.onnx import export_onnx
from tamis.passes.reduction import TokenReduction
from tamis.rewrite import Pipeline, Result

METHODS = {name: cls for name, cls in reductions().items() if not cls.own_count}
NAME = "deit_distilled"
FAMILY = FAMILIES[NAME]
LAYERS = (1, 2)
CHANNELS = 96
BUDGET = 1e-5  # sizes and scores are float32 whatever the model is


def method(name: str, **amount: float) -> TokenReduction:
    return made(METHODS[name], LAYERS, CHANNELS, FAMILY.layers, **(amount or {"keep_ratio": 0.7}))


@cache
def rewritten(name: str, dtype: torch.dtype = torch.float64) -> Result:
    return Pipeline((method(name),)).run(captured(NAME, dtype), token_map=True)


@pytest.mark.parametrize("name", METHODS)
def test_in_a_model_it_is_the_forward_written_by_hand(name: str) -> None:
    model, result = FAMILY.shared(torch.float64), rewritten(name)
    for batch in (1, 5):
        inputs = FAMILY.inputs(batch, seed=batch, dtype=torch.float64)
        answer = reduced_forward(FAMILY, model, inputs, method(name))
        *outputs, source = run(result, inputs)
        assert_equal_outputs(outputs, answer.outputs, BUDGET)
        assert torch.equal(source, answer.stream.source)
        assert [o.layer for o in applied(result)] == [layer for layer, _, _ in answer.stream.counts] == list(LAYERS)
        assert all(
            distance(mine, dense) > 1e-3 for mine, dense in zip(outputs, run(captured(NAME), inputs), strict=True)
        )


@pytest.mark.parametrize("name", [name for name, cls in METHODS.items() if not cls.always])
@pytest.mark.parametrize("amount", [{"r": 0}, {"keep_ratio": 1.0}], ids=["r=0", "keep_ratio=1"])
def test_where_nothing_is_to_leave_the_model_is_bitwise_itself(name: str, amount: dict[str, float]) -> None:
    inputs = FAMILY.inputs(3, dtype=torch.float64)
    result = Pipeline((method(name, **amount),)).run(captured(NAME), allow_noop=True)
    assert not result.changed
    for mine, dense in zip(run(result, inputs), run(captured(NAME), inputs), strict=True):
        assert torch.equal(mine, dense)


@pytest.mark.parametrize("name", METHODS)
def test_neighbours_in_the_batch_do_not_change_a_row(name: str) -> None:
    result = rewritten(name)
    together, alone = (run(result, FAMILY.inputs(batch, dtype=torch.float64)) for batch in (4, 1))
    assert torch.equal(together[-1][:1], alone[-1])
    assert_equal_outputs([x[:1] for x in together[:-1]], alone[:-1], 1e-9)


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
def test_onnx_runtime_chooses_the_same_tokens(name: str, tmp_path: Path) -> None:
    program = rewritten(name, torch.float32).graph.program
    export_onnx(program, tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    args, kwargs = FAMILY.inputs(5)
    got = session.run(None, {session.get_inputs()[0].name: args[0].numpy()})
    expected = run(rewritten(name, torch.float32), (args, kwargs))
    np.testing.assert_array_equal(got[-1], expected[-1].numpy())
    assert_equal_outputs([torch.from_numpy(x) for x in got[:-1]], expected[:-1], 1e-4)
