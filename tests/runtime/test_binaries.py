"""Kernels beside an artifact: who may use them, and when they are compiled again instead."""

from __future__ import annotations

import json

import pytest
import torch

from tamis.errors import OutputExists, UnknownTarget
from tamis.kernels.triton.architecture import KNOWN, Architecture
from tamis.runtime import binaries
from tamis.target import Target


@pytest.fixture
def on_sm_90(monkeypatch):
    """A machine with such a GPU, as far as choosing binaries goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Architecture, "of", staticmethod(lambda device: KNOWN["sm_90"]))
    installed = []
    monkeypatch.setattr(binaries, "install", installed.append)
    return installed


def listing(folder, architecture="sm_90", triton=None):
    import triton as here

    kernel = {"name": "match_0", "cache_key": "0" * 64, "kernel": "match"}
    versions = {"triton": triton or here.__version__}
    content = {"architecture": architecture, "versions": versions, "kernels": [kernel]}
    (folder / "kernels.json").write_text(json.dumps(content))
    entry = folder / "kernels" / "match_0"
    entry.mkdir(parents=True)
    (entry / "match.cubin").write_bytes(b"code")
    return content


def test_they_are_installed_where_all_matches(on_sm_90, tmp_path):
    listing(tmp_path)
    assert "1 in use, made for sm_90" in binaries.use_binaries(tmp_path, trusted=True)
    assert on_sm_90 == [binaries.Entry("0" * 64, "match", {"match.cubin": b"code"})]


def _with_kernel(**fields):
    return lambda content: json.dumps(
        {**content, "kernels": [*content["kernels"], {**content["kernels"][0], **fields}]}
    )


DAMAGED = {
    "no JSON": lambda content: "{",
    "no text": lambda content: b"\xff\xfe\xff",
    "nested without end": lambda content: "[" * 200_000,
    "a list": lambda content: "[]",
    "fields missing": lambda content: "{}",
    "no list of kernels": lambda content: json.dumps({**content, "kernels": 5}),
    "kernels are words": lambda content: json.dumps({**content, "kernels": ["match_0"]}),
    "a folder that is not there": _with_kernel(name="match_1"),
    "a folder elsewhere": _with_kernel(name="../kernels/match_0"),
    "a name that is a number": _with_kernel(name=1),
    "a key that is no hash": _with_kernel(cache_key="zz"),
    "a kernel's name that is a path": _with_kernel(kernel="../match"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_list_is_left_alone_as_a_whole(on_sm_90, tmp_path, damage):
    text = DAMAGED[damage](listing(tmp_path))
    (tmp_path / "kernels.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    line = binaries.use_binaries(tmp_path, trusted=True)
    assert line == "compiled kernels: unreadable: compiled again when first called"
    assert on_sm_90 == []


@pytest.mark.parametrize(
    ("made", "trusted", "said"),
    [
        ({}, False, "left alone: trusted=True uses them"),
        ({"architecture": "sm_80"}, True, "made for sm_80, and this is sm_90: compiled again"),
        ({"triton": "3.0.0"}, True, "made by Triton 3.0.0, and this is"),
    ],
)
def test_else_they_are_left_alone_and_it_is_said(on_sm_90, tmp_path, made, trusted, said):
    listing(tmp_path, **made)
    assert said in binaries.use_binaries(tmp_path, trusted=trusted)
    assert on_sm_90 == []


def test_without_a_gpu_nothing_is_said(tmp_path):
    listing(tmp_path)
    assert binaries.use_binaries(tmp_path, trusted=True) == ("" if not torch.cuda.is_available() else pytest.skip())


def test_an_architecture_is_needed_and_nothing_is_overwritten(tmp_path):
    with pytest.raises(UnknownTarget, match="cpu without an architecture"):
        binaries.write_kernels(None, tmp_path, Target("cpu"))
    (tmp_path / "kernels").mkdir()
    with pytest.raises(OutputExists, match="kernels: exists already"):
        binaries.write_kernels(None, tmp_path, Target.named("sm_90"))


@pytest.mark.parametrize("name", ["h100", "sm_13", "sm_999", "cuda:sm_70", "rocm:gfx000", "gfx1"])
def test_architectures_that_triton_does_not_know_are_refused_before_any_work(name):
    with pytest.raises(UnknownTarget, match="sm_80, sm_86"):
        Target.named(name)


def test_an_architecture_may_be_named_as_the_command_names_it():
    assert Target.named("sm_90") == Target.named("cuda:sm_90") == Target("cuda", "sm_90")
    assert Target.named("gfx942") == Target("rocm", "gfx942")
