"""ONNX files that packages on the package index ship, made by other people's exporters (docs/onnx.md has the table)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils import _pytree as pytree

import tamis
from tamis.errors import TamisError

pytestmark = pytest.mark.full


@dataclass(frozen=True)
class File:
    """A file of a package: attention sites found, or the error that refuses it and part of what it says."""

    package: str
    path: str
    sites: int = 0
    refused: str = ""
    reason: str = ""


FILES = {
    "magika": File("magika", "models/standard_v3_3/model.onnx"),
    "text recognition": File("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx", sites=2),
    "text direction": File("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
    "speech, sequence": File("silero_vad", "data/silero_vad_16k_sequence.onnx"),
    "speech": File("silero_vad", "data/silero_vad_openvino_16k.onnx"),
    "speech, two rates": File(
        "silero_vad", "data/silero_vad.onnx", refused="ValueUnknown", reason="needs the value of its input 'condition'"
    ),
    "sigmoid": File("onnxruntime", "datasets/sigmoid.onnx"),
    "mul": File("onnxruntime", "datasets/mul_1.onnx"),
    "iris": File("onnxruntime", "datasets/logreg_iris.onnx", refused="TypeUnsupported", reason="is of type map"),
}


def path_of(file: File) -> str:
    spec = importlib.util.find_spec(file.package)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {file.package} is not installed")
    path = Path(spec.origin).parent / file.path
    if not path.is_file():
        pytest.skip(f"this version of {file.package} has no {file.path}")
    return str(path)


@pytest.mark.parametrize("name", [name for name, file in FILES.items() if not file.refused])
def test_files_that_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    path, out = path_of(FILES[name]), str(tmp_path / "out.onnx")
    whole = tamis.compile(path, passes=[], allow_noop=True)
    assert whole.original is not None
    assert len(whole.original.sites) == FILES[name].sites
    whole.export(out)
    given = pytree.tree_leaves(whole.example_call)
    sessions = [onnxruntime.InferenceSession(one, providers=["CPUExecutionProvider"]) for one in (path, out)]
    named = [[(one.name, one.type, len(one.shape)) for one in session.get_inputs()] for session in sessions]
    assert named[0] == named[1]
    feeds = {one.name: value.numpy() for one, value in zip(sessions[0].get_inputs(), given, strict=True)}
    with torch.no_grad():
        computed = pytree.tree_leaves(whole(*given))
    expected, again = (session.run(None, feeds) for session in sessions)
    for want, torch_s, file_s in zip(expected, computed, again, strict=True):
        np.testing.assert_allclose(torch_s.numpy(), want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(file_s, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, file in FILES.items() if file.refused])
def test_files_that_are_refused(name: str) -> None:
    file = FILES[name]
    with pytest.raises(TamisError) as error:
        tamis.compile(path_of(file), passes=[], allow_noop=True)
    assert type(error.value).__name__ == file.refused
    assert file.reason in str(error.value)


def test_tokens_of_a_text_recogniser_are_merged(tmp_path: Path) -> None:
    """PP-OCRv4's recogniser is a convolution network with a transformer on top, written by Paddle's exporter."""
    path, out = path_of(FILES["text recognition"]), str(tmp_path / "out.onnx")
    images = torch.randn(2, 3, 48, 320, generator=torch.Generator().manual_seed(0))
    fast = tamis.compile(path, (images,), passes="tome:r=4", dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert sum(outcome["applied"] for outcome in fast.report.outcomes) == 2
    fast.export(out)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = fast(images).numpy()
    assert got.shape == expected.shape
    assert np.linalg.norm(got - expected) <= 1e-3 * np.linalg.norm(expected)
