"""`--target cuda:sm_90` where there is none: a directory with model and kernels, or an error before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import run

import tamis

FACTORY = """
import timm, torch
def make():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    return model, (torch.randn(2, 3, 64, 64),)
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORY)
    return "nets.py:make"


def test_the_directory_has_the_model_and_its_kernels(capsys, factory, tmp_path):
    code, out, err = run(capsys, factory, "--pass", "tome:r=2", "--target", "cuda:sm_90", "-o", "out/")
    assert code == 0, err
    assert "kernels for sm_90" in out
    listed = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert {path.name for path in (tmp_path / "out" / "kernels").iterdir()} == {
        one["name"] for one in listed["kernels"]
    }
    assert tamis.load("out/model.pt2").recipe.options["target"] == "cuda:sm_90"
    assert (tmp_path / "out" / "model.onnx").exists()


def test_kernels_need_a_directory(capsys, factory):
    code, _, err = run(capsys, factory, "--pass", "tome:r=2", "--target", "cuda:sm_90", "-o", "small.onnx")
    assert code == 2
    assert "--target cuda:sm_90 writes kernels, and small.onnx is one file" in err
    assert "-o out/" in err


def test_a_device_without_a_name_must_be_here(capsys, factory):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    code, _, err = run(capsys, factory, "--pass", "tome:r=2", "--target", "cuda", "-o", "out/")
    assert code == 2
    assert "no such device" in err
    assert "cuda:sm_90" in err
