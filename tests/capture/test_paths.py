"""`check_exists`: names of models are read and looked for without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tamis.capture.paths import Spec, check_exists
from tamis.errors import ModelNotFound, UnknownModelFormat


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("vit.pt2", "vit.onnx", "net.py", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("timm:vit_base_patch16_224.augreg_in21k", Spec("timm", "vit_base_patch16_224.augreg_in21k")),
        ("hf:google/vit-base-patch16-224", Spec("hf", "google/vit-base-patch16-224")),
        ("hf:gpt2", Spec("hf", "gpt2")),
        ("hf:bert", Spec("hf", "bert")),
        ("hf:./bert", Spec("hf", "bert")),
        ("bert", Spec("hf", "bert")),
        ("net.py:make", Spec("factory", "net.py", "make")),
        ("vit.pt2", Spec("pt2", "vit.pt2")),
        ("./vit.pt2", Spec("pt2", "vit.pt2")),
        ("vit.onnx", Spec("onnx", "vit.onnx")),
    ],
)
def test_read(here: Path, text: str, spec: Spec) -> None:
    assert check_exists(text) == spec
    if spec.kind == "pt2":
        assert check_exists(Path(text)) == spec


def test_missing(here: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        check_exists("vti.pt2")
    assert str(caught.value) == "vti.pt2: no such file or directory.\n  hint: did you mean vit.pt2?"
    with pytest.raises(
        ModelNotFound, match=r"nowhere/x.pt2: no such file or directory.\n  hint: give a .pt2 or .onnx file, timm:"
    ):
        check_exists("nowhere/x.pt2")
    with pytest.raises(ModelNotFound, match=r"nte.py: no such file"):
        check_exists("nte.py:make")
    with pytest.raises(ModelNotFound, match=r"./brt: no such file or directory.\n  hint: did you mean bert?"):
        check_exists("hf:./brt")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (
            "notes.txt",
            "give a .pt2 or .onnx file, timm:NAME, hf:DIR_OR_ID, a directory with config.json, or file.py:function",
        ),
        ("net.py", "give the function that makes the model: net.py:FUNCTION"),
        ("empty", "give a directory with config.json and model.safetensors"),
        ("hf:./empty", "give a directory with config.json and model.safetensors"),
    ],
)
def test_unreadable(here: Path, text: str, advice: str) -> None:
    with pytest.raises(UnknownModelFormat) as caught:
        check_exists(text)
    assert "do not know how to read this as a model" in str(caught.value)
    assert advice in str(caught.value)


def test_it_needs_no_torch() -> None:
    code = "import sys, tamis.capture.paths; sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
