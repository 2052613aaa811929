"""Where tokens went, in every door: the module's second output, a loaded program's, and an output of the ONNX file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils import _pytree as pytree
from zoo import FAMILIES

import tamis
from tamis.runtime.compiled import CompiledModel


def compiled(name: str, passes: str) -> CompiledModel:
    family = FAMILIES[name]
    args, kwargs = family.inputs(2)
    return tamis.compile(family.model(layers=1), args, kwargs=kwargs, passes=passes, token_map=True, verify=False)


@pytest.mark.parametrize(
    ("name", "passes", "outputs", "tokens"),
    [
        ("bert", "random:keep_ratio=0.6,layers=[0]", ["last_hidden_state", "pooler_output"], "sequence"),
        ("vit_mean", "tome:r=3", ["output_0"], 37),
    ],
)
def test_an_output_of_the_onnx_file(
    name: str, passes: str, outputs: list[str], tokens: str | int, tmp_path: Path
) -> None:
    """The other outputs keep their names; dimensions are the model's; values are torch's at other sizes too."""
    fast = compiled(name, passes)
    session = onnxruntime.InferenceSession(fast.export(tmp_path / "x.onnx"))
    found = session.get_outputs()
    assert [one.name for one in found] == [*outputs, "token_map"]
    assert (found[-1].shape, found[-1].type) == (["batch", tokens], "tensor(int64)")
    for batch in (1, 5):
        args, kwargs = FAMILIES[name].inputs(batch)
        leaves = pytree.tree_leaves((args, kwargs))
        feeds = {one.name: x.numpy() for one, x in zip(session.get_inputs(), leaves, strict=True)}
        where = session.run(["token_map"], feeds)[0]
        with torch.no_grad():
            expected = fast(*args, **kwargs)[1]
        np.testing.assert_array_equal(where, expected.numpy())
        assert where.min() == (-1 if name == "bert" else 0)


def test_after_loading(tmp_path: Path) -> None:
    fast = compiled("vit_mean", "tome:r=3")
    loaded = tamis.load(fast.save(tmp_path / "x.pt2"))
    args, _ = FAMILIES["vit_mean"].inputs(3)
    with torch.no_grad():
        assert torch.equal(loaded(*args)[1], fast(*args)[1])
    session = onnxruntime.InferenceSession(loaded.export(tmp_path / "x.onnx"))
    assert [one.name for one in session.get_outputs()] == ["output_0", "token_map"]


def test_without_a_reduction_every_token_stays_where_it_is() -> None:
    family = FAMILIES["bert"]
    args, kwargs = family.inputs(3)
    options = {"token_map": True, "allow_noop": True, "verify": False}
    fast = tamis.compile(family.model(layers=1), args, kwargs=kwargs, passes="tome:r=0", **options)
    mask = kwargs["attention_mask"]
    with torch.no_grad():
        where = fast(*args, **kwargs)[1]
    assert torch.equal(where, torch.where(mask.bool(), torch.arange(mask.shape[1]), -1))
