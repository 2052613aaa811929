"""Every kernel compiles for every architecture, and takes no more of it than it may.  No GPU is needed."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.kernels.triton import twin_of
from tamis.kernels.triton.ahead import Binary, compile_launch
from tamis.kernels.triton.architecture import Architecture
from tamis.kernels.triton.launch import Launch
from tamis.kernels.triton.resources import resources_of
from tamis.op import OPS

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "gfx942"]
CASES = [
    pytest.param(twin, args, id=f"{name}-{i}")
    for name, op in OPS.items()
    if (twin := twin_of(op))
    for i, args in enumerate(twin.examples())
]
MAIN = ("sm_90", "gfx942")  # one of each compiler; on the others an op's first example, and all for `--full`
PAIRS = [
    pytest.param(
        *case.values,
        architecture,
        id=f"{case.id}-{architecture}",
        marks=[] if architecture in MAIN or case.id.endswith("-0") else [pytest.mark.full],
    )
    for case in CASES
    for architecture in ARCHITECTURES
]


@functools.cache
def architecture_of(name: str) -> Architecture:
    return Architecture.named(name)


@pytest.mark.parametrize(("twin", "args", "architecture"), PAIRS)
def test_resources_are_within_the_budget(twin, args, architecture):
    one = architecture_of(architecture)
    launches, _ = twin.work(one, *args)
    assert launches
    for launch in launches:
        binary = compile_launch(launch, one)
        assert binary.seconds <= 5.0, f"{binary.kernel}: {binary.seconds:.1f} s to compile"
        assert_fits(binary, one)
        assert_right_instructions(binary, launch)


def assert_fits(binary: Binary, architecture: Architecture) -> None:
    used = resources_of(binary)
    assert (used.stack, used.spills) == (0, 0), f"{binary.kernel} spills: {used}"
    assert used.registers * used.threads <= architecture.registers, used
    assert used.shared <= architecture.shared, used


def assert_right_instructions(binary: Binary, launch: Launch) -> None:
    """Products of 16-bit numbers must run on the tensor cores, on sm_90 by its own instructions."""
    halves = any(kind in ("*fp16", "*bf16") for kind in binary.signature.types.values())
    if not halves or "tt.dot" not in binary.text("ttir"):
        return
    found: dict[str, Any] = resources_of(binary).instructions
    name = binary.architecture.name
    if name == "sm_90":
        assert found.get("HGMMA", 0) > 0, (launch.name, found)
        assert found.get("HMMA", 0) == 0, (launch.name, found)
    else:
        assert any(found.get(kind) for kind in ("HMMA", "UTCHMMA", "MFMA")), (launch.name, found)
