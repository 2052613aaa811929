"""An exported file as a torch module: the same numbers, on torch's memory, with the reason where it is no GPU."""

from __future__ import annotations

import logging

import onnxruntime
import pytest
import torch
from torch import nn

import tamis
from tamis.errors import InputMismatch, ModelNotFound, TargetMissing


class Several(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.where(mask, x * 2, 0.0), mask.sum(1), ~mask


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("onnx") / "several.onnx"
    example = (torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool))
    names = {"input_names": ["x", "mask"], "output_names": ["y", "count", "rest"]}
    shapes = ({0: "batch"}, {0: "batch"})
    torch.onnx.export(Several(), example, file, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    return file


def test_tensors_in_and_out(path):
    model = tamis.load(path)
    x, mask = torch.randn(5, 3), torch.rand(5, 3) > 0.5
    want = Several()(x, mask)
    for got in (model(x, mask), model(x, mask=mask), model(mask=mask, x=x)):
        assert list(got) == ["y", "count", "rest"]
        torch.testing.assert_close(got["y"], want[0], rtol=0, atol=0)
        assert torch.equal(got["count"], want[1])
        assert got["rest"].dtype == torch.bool
        assert torch.equal(got["rest"], want[2])
    spread = torch.randn(3, 5).t()
    torch.testing.assert_close(model(spread, mask)["y"], Several()(spread, mask)[0], rtol=0, atol=0)


def test_results_of_two_calls_are_their_own(path):
    model, mask = tamis.load(path), torch.ones(2, 3, dtype=torch.bool)
    first = model(torch.ones(2, 3), mask)["y"]
    model(torch.zeros(2, 3), mask)
    assert torch.equal(first, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("call", [((), {}), ((torch.ones(2, 3),), {}), ((torch.ones(2, 3),) * 3, {})])
def test_wrong_arguments_are_said(path, call):
    with pytest.raises(InputMismatch, match="its inputs are x, mask"):
        tamis.load(path)(*call[0], **call[1])


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.ones(2, 3, dtype=torch.float64), "x must be a tensor of float, got double"),
        (torch.ones(2, 3, dtype=torch.uint16), "x must be a tensor of float, got torch.uint16"),
        ([1.0, 2.0], "x must be a tensor of float, got list"),
        (torch.ones(2, 4), "sizes must be those of the file's inputs, got x"),
    ],
)
def test_wrong_tensors_are_said(path, x, said):
    with pytest.raises(InputMismatch, match=said):
        tamis.load(path)(x, torch.ones(2, 3, dtype=torch.bool))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ModelNotFound):
        tamis.load(tmp_path / "none.onnx")


def test_without_a_gpu_cuda_is_refused_and_auto_is_silent(path, caplog):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(TargetMissing, match="torch sees no CUDA device"):
        tamis.load(path, device="cuda")
    with caplog.at_level(logging.WARNING):
        assert tamis.load(path).note == ""
    assert caplog.records == []


def test_falling_back_is_said_once(path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with caplog.at_level(logging.WARNING):
        model = tamis.load(path)
        model(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    assert model.device.type == "cpu"
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} runs on the CPU: this ONNX Runtime has no CUDA provider (the package onnxruntime-gpu has)"
    ]
