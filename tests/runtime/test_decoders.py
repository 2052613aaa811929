"""Decoders through the whole of tamis: compiled as they are, checked, saved, and as ONNX files with their cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from decoders import DECODERS, captured, prompt

import tamis
from tamis.errors import InputMismatch
from tamis.passes import ToMe
from tamis.registry import registered_passes
from tamis.runtime.check import check_model

HEAVY = [pytest.param(name, marks=pytest.mark.full) for name in DECODERS if name != "gemma2"]


@pytest.mark.parametrize("name", ["gemma2", *HEAVY])
def test_an_onnx_file_returns_logits_and_cache(name: str, tmp_path: Path) -> None:
    model, _ = captured(name)
    fast = tamis.compile(model, kwargs=prompt(2, 12, "left"), passes=[], allow_noop=True)
    fast.export(tmp_path / "decoder.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "decoder.onnx"), providers=["CPUExecutionProvider"])
    layers = range(len(DECODERS[name].windows))
    presents = [f"present.{layer}.{which}" for layer in layers for which in ("key", "value")]
    assert [output.name for output in session.get_outputs()] == ["logits", *presents]
    for batch, length in ((1, 1), (3, 7), (2, 33)):
        inputs = prompt(batch, length, "mixed")
        logits, *pairs = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        with torch.no_grad():
            expected = fast(**inputs)
        real = inputs["attention_mask"].bool().numpy()
        np.testing.assert_allclose(logits[real], expected.logits.numpy()[real], rtol=1e-4, atol=1e-4)
        flat = [one.transpose(1, 2).numpy() for pair in expected.past_key_values for one in pair]
        for got, want in zip(pairs, flat, strict=True):
            np.testing.assert_allclose(got.transpose(0, 2, 1, 3)[real], want[real], rtol=1e-4, atol=1e-4)


def test_last_token_only_is_what_it_was_captured_for(tmp_path: Path) -> None:
    model, _ = captured("llama")
    fast = tamis.compile(
        model, kwargs={**prompt(2, 12, "left"), "logits_to_keep": 1}, passes=[], allow_noop=True, verify=False
    )
    inputs = prompt(3, 7, "left")
    logits = fast(**inputs).logits
    assert logits.shape == (3, 1, 60)
    assert torch.equal(fast(**inputs, logits_to_keep=1).logits, logits)
    with pytest.raises(InputMismatch, match="logits_to_keep == 1"):
        fast(**inputs, logits_to_keep=2)
    fast.export(tmp_path / "decoder.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "decoder.onnx"), providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == ["input_ids", "attention_mask"]
    (got,) = session.run(["logits"], {key: value.numpy() for key, value in inputs.items()})
    np.testing.assert_allclose(got, logits.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, _ = captured("gemma2")
    fast = tamis.compile(model, kwargs=prompt(2, 12, "left"), passes=[], allow_noop=True)
    loaded = tamis.load(fast.save(tmp_path / "decoder.pt2"))
    inputs = prompt(3, 7, "left")
    got, expected = loaded(**inputs), fast(**inputs)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.past_key_values[1][0], expected.past_key_values[1][0])


def test_check_describes_a_decoder() -> None:
    answer = check_model(captured("gemma2")[1], ((), prompt(2, 12, "left")), passes=[ToMe(r=1)])
    local, everywhere = answer["sites"]
    assert (local["heads"], local["soft cap"], local["rope"]) == ("4 / 2 x 16", 4.0, "yes")
    assert local["mask"] == "window 4 before, 0 after + causal + padding"
    assert everywhere["mask"] == "causal + padding"
    (tome,) = answer["passes"]
    assert not tome["applies"]
    assert tome["reason"].startswith("attention is causal")


@pytest.mark.full
def test_check_tries_every_pass_on_a_decoder() -> None:
    """Of an encoder tests/runtime/test_check.py asks the same at every change."""
    answer = check_model(captured("gemma2")[1], ((), prompt(2, 12, "left")))
    applies = {one["name"]: one["applies"] for one in answer["passes"]}
    assert applies.keys() == set(registered_passes())
    assert (applies["tome"], applies["a-shape"]) == (False, True)
