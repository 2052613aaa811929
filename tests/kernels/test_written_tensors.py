"""Inductor must find that a kernel writes its results and nothing that it was given: that would be copied before it.

It reads that from the kernel's intermediate form, for which it asks the driver about the GPU; no GPU is needed else.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch._higher_order_ops import triton_kernel_wrap

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.kernels.triton import twin_of
from tamis.kernels.triton.ahead import gpu_target
from tamis.kernels.triton.architecture import Architecture
from tamis.op import OPS

SM_90 = Architecture.named("sm_90")
CASES = [
    pytest.param(twin, args, id=f"{name}-{i}")
    for name, op in OPS.items()
    if (twin := twin_of(op))
    for i, args in enumerate(twin.examples())
]


@pytest.fixture(autouse=True)
def described_gpu(monkeypatch):
    driver = SimpleNamespace(get_current_target=lambda: gpu_target(SM_90), get_current_device=lambda: 0)
    monkeypatch.setattr(type(triton.runtime.driver), "active", driver, raising=False)


def written(launch: Any) -> set[str]:
    """Names of the arguments that Inductor takes for written."""
    given = {**launch.arguments, **launch.config.constants}
    on_cpu = {
        name: torch.empty(0, dtype=one.dtype) if isinstance(one, torch.Tensor) else one for name, one in given.items()
    }
    if hasattr(triton_kernel_wrap, "identify_accessed_tensors"):
        found = triton_kernel_wrap.identify_accessed_tensors(launch.kernel, on_cpu, {})
        return {one.name for one in found.read_writes.writes}
    return set(triton_kernel_wrap.identify_mutated_tensors(launch.kernel, on_cpu, {}))  # torch 2.11


@pytest.mark.parametrize(("twin", "args"), CASES)
def test_only_new_tensors_count_as_written(twin, args):
    inputs = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, torch.Tensor)}
    launches, _ = twin.work(SM_90, *args)
    for launch in launches:
        names = written(launch)
        assert names, launch.name
        taken = {name for name in names if launch.arguments[name].untyped_storage()._cdata in inputs}
        assert not taken, (launch.name, taken)
