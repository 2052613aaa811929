"""What a newcomer does wrong first, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo import FAMILIES

import tamis
from tamis.errors import BadParameter, InputMismatch, NothingChanged, TargetMissing, UnknownOutputFormat
from tamis.runtime.compiled import CompiledModel


@pytest.fixture(scope="module")
def fast() -> CompiledModel:
    family = FAMILIES["vit_small"]
    return tamis.compile(family.shared(), family.inputs(2)[0], passes="tome:r=3", verify=False)


def test_another_image_size(fast: CompiledModel) -> None:
    (images,), _ = FAMILIES["vit_small"].inputs(2)
    larger = torch.zeros(2, 3, images.shape[2] + 8, images.shape[3] + 8)
    with pytest.raises(
        InputMismatch, match=r"(?s)inputs must satisfy x\.size\(\)\[2\] == .*only batch and sequence length"
    ):
        fast(larger)
    with pytest.raises(InputMismatch):
        fast.verify(larger)


def test_the_wrong_suffix(fast: CompiledModel, tmp_path: Path) -> None:
    with pytest.raises(UnknownOutputFormat):
        fast.save(tmp_path / "x.onnx")
    with pytest.raises(UnknownOutputFormat):
        fast.export(tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


def test_reducing_a_reduced_model(fast: CompiledModel) -> None:
    with pytest.raises(NothingChanged, match="was reduced before; put all passes in one recipe"):
        tamis.compile(fast.graph.program, passes="random:r=2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_not_here() -> None:
    family = FAMILIES["vit_small"]
    with pytest.raises(TargetMissing, match="target cuda: this machine has no such device"):
        tamis.compile(family.shared(), family.inputs(2)[0], passes="tome:r=3", target="cuda")


@pytest.mark.parametrize(
    ("passes", "text"),
    [
        ("evit:fuse=maybe", "evit: fuse must be true or false, got 'maybe'"),
        ("random:r=2,seed=0.5", "random: seed must be a whole number, got 0.5"),
        ("tome:r={99:8}", r"tome: layers must be between 0 and \d, got 99"),
    ],
)
def test_parameters_of_the_wrong_kind(passes: str, text: str) -> None:
    family = FAMILIES["vit_small"]
    with pytest.raises(BadParameter, match=text):
        tamis.compile(family.shared(), family.inputs(2)[0], passes=passes)
