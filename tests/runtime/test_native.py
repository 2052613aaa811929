"""Native packages: code that runs without tamis, loaded only where it is trusted."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from command import run

import tamis
from tamis.errors import CorruptModel, InputMismatch, UntrustedNativeCode

WITHOUT_TAMIS = """
import sys, torch
sys.modules["tamis"] = None  # importing it is an error
model = torch._inductor.aoti_load_package(sys.argv[1])
images, expected = torch.load(sys.argv[2], weights_only=True)
torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
print("same")
"""


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="module")
def fast():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()
    return tamis.compile(model, (images(2),), passes="tome:r=2")


@pytest.fixture(scope="module")
def saved(fast, tmp_path_factory) -> Path:
    return Path(fast.save(tmp_path_factory.mktemp("native") / "fast.pt2", native=True))


def test_it_runs_where_tamis_is_not(fast, saved, tmp_path):
    with torch.no_grad():
        torch.save((images(3), fast(images(3))), tmp_path / "case.pt")
    command = [sys.executable, "-c", WITHOUT_TAMIS, str(saved), str(tmp_path / "case.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_it_is_loaded_where_it_is_trusted(fast, saved):
    with pytest.raises(UntrustedNativeCode):
        tamis.load(saved)
    loaded = tamis.load(saved, trusted=True)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x=images(2)), fast(images(2)), rtol=1e-4, atol=1e-5)
        for batch in (1, 5):
            torch.testing.assert_close(loaded(images(batch)), fast(images(batch)), rtol=1e-4, atol=1e-5)
    assert loaded.recipe == fast.recipe
    assert "tome:r=2" in str(loaded)


def test_layouts_are_brought_to_the_examples(fast, saved):
    loaded, x = tamis.load(saved, trusted=True), images(4)
    with torch.no_grad():
        for other in (x.to(memory_format=torch.channels_last), x[::2], x.transpose(2, 3)):
            torch.testing.assert_close(loaded(other), fast(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [images(2).double(), images(2).half(), torch.randn(2, 3, 32, 32), torch.randn(3, 64, 64)]
)
def test_what_would_be_read_wrongly_is_refused(saved, wrong):
    with pytest.raises(InputMismatch, match=r"x must be torch.float32 \[any, 3, 64, 64\], got"):
        tamis.load(saved, trusted=True)(wrong)


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((images(1), images(1)), {}), ((), {"y": images(1)})])
def test_wrong_arguments_are_refused(saved, args, kwargs):
    with pytest.raises(InputMismatch):
        tamis.load(saved, trusted=True)(*args, **kwargs)


def test_a_broken_package_is_said_so(saved, tmp_path):
    with zipfile.ZipFile(saved) as whole, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as broken:
        for name in whole.namelist():
            broken.writestr(name, b"garbage" if name.endswith(".so") else whole.read(name))
    with pytest.raises(CorruptModel, match="a native package for this machine"):
        tamis.load(tmp_path / "bad.pt2", trusted=True)


def test_the_recipe_is_read_without_running_code(saved, capsys):
    code, out, err = run(capsys, "--show-recipe", str(saved))
    assert code == 0, err
    assert "tome:r=2" in out


def test_native_is_for_pt2_files(capsys, tmp_path):
    code, _, err = run(
        capsys, "timm:vit_tiny_patch16_224", "--pass", "tome:r=2", "--native", "-o", str(tmp_path / "x.onnx")
    )
    assert code == 2
    assert "-o model.pt2" in err
