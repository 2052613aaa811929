"""On which GPU kernels are launched, as far as that can be told without two of them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tamis.kernels.triton.launch import _current

SECOND = torch.device("cuda", 1)


def test_the_gpu_of_the_tensors_becomes_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    other = _current(SECOND, [torch.zeros(1)])
    assert isinstance(other, torch.cuda.device)
    assert other.idx == 1
    assert isinstance(_current(torch.device("cuda", 0), [torch.zeros(1)]), nullcontext)


def test_tracing_and_interpreting_ask_for_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked for the current GPU"))
    with FakeTensorMode():
        fake = torch.empty(1, device=SECOND)
    assert isinstance(_current(SECOND, [fake, None, 3]), nullcontext)
    assert isinstance(_current(torch.device("cpu"), [torch.zeros(1)]), nullcontext)
