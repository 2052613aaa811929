"""Kernels on the GPU at hand: against float64 on the CPU, through Inductor, and from binaries made ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from budgets import assert_within_budget, in_float64, results
from twins import every_sample, one_sample, spread

from tamis.kernels.triton.launch import as_torch_op

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def moved(args, device):
    return [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args]


@pytest.fixture(autouse=True)
def poison():
    """Memory that a kernel does not write holds NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@every_sample
def test_equals_float64(op, twin, args):
    got = [one.cpu() for one in results(op.call(*moved(args, "cuda")))]
    assert_within_budget(got, op.reference(*args), op.reference(*in_float64(args)))


@one_sample
def test_strides_are_honoured(op, twin, args):
    args = moved(args, "cuda")
    other = [spread(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
    for got, expected in zip(results(op.call(*other)), results(op.call(*args)), strict=True):
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@one_sample
def test_inductor_sees_through(op, twin, args):
    twin_op, args = as_torch_op(op, twin), moved(args, "cuda")
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]

    @torch.compile(fullgraph=True)
    def call(*given):
        left = iter(given)
        return twin_op(*(next(left) if isinstance(arg, torch.Tensor) else arg for arg in args))

    torch._dynamo.reset()
    for got, expected in zip(results(call(*tensors)), results(op.call(*args)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3, equal_nan=True)


RUN = """
import sys, torch, tamis
import triton.backends.nvidia.compiler as compiler
def refuse(*_, **__): raise RuntimeError("no compiler")
compiler.CUDABackend.add_stages = refuse
fast = tamis.load(sys.argv[1], trusted=True)
assert "in use" in str(fast.report), fast.report
fast = fast.cuda()
with torch.no_grad():
    print(fast(torch.ones(2, 3, 64, 64, device="cuda", dtype=torch.float16)).float().sum().item())
"""


def test_launches_from_binaries_with_no_compiler(tmp_path: Path):
    import timm

    import tamis
    from tamis.kernels.triton.architecture import Architecture

    architecture = Architecture.of(torch.device("cuda")).name
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval().half()
    example = (torch.ones(2, 3, 64, 64, dtype=torch.float16),)
    fast = tamis.compile(model, example, passes="tome:r=2", target=f"cuda:{architecture}", verify=False)
    fast.save(tmp_path / "model.pt2")
    fast.write_kernels(tmp_path)
    with torch.no_grad():
        expected = fast.cuda()(example[0].cuda()).float().sum().item()
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", RUN, str(tmp_path / "model.pt2")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-2)


def test_a_native_package_has_the_kernels_inside(tmp_path: Path):
    import timm

    import tamis

    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval().half().cuda()
    images = torch.randn(2, 3, 64, 64, device="cuda", dtype=torch.float16)
    fast = tamis.compile(model, (images,), passes="tome:r=2", verify=False)
    fast.save(tmp_path / "native.pt2", native=True)
    with torch.no_grad():
        got, expected = torch._inductor.aoti_load_package(str(tmp_path / "native.pt2"))(images), fast(images)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
