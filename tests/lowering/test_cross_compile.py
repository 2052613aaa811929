"""Kernels of a rewritten model for GPUs that are not here: what is compiled, listed and written."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import timm
import torch

import tamis
from tamis.errors import MissingDependency
from tamis.lowering.cross_compile import cross_compile
from tamis.lowering.gpu import for_gpu


@pytest.fixture(scope="module")
def fast():
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=3).eval().half()
    return tamis.compile(model, (torch.randn(2, 3, 96, 96).half(),), passes="tome:r=4", verify=False)


@pytest.fixture(scope="module")
def compiled(fast):
    return cross_compile(fast.graph.program, "sm_90")


def test_every_kernel_is_compiled_once_and_every_node_is_accounted_for(fast, compiled):
    names = [one.binary.name for one in compiled.kernels]
    assert names
    assert len(names) == len(set(names))
    launched = {use.node for one in compiled.kernels for use in one.uses}
    by_reference = {one.node for one in compiled.lowered.placed if one.reason}
    assert launched | by_reference == {one.node for one in compiled.lowered.placed}
    assert not launched & by_reference


def test_one_matching_kernel_serves_all_layers(compiled):
    uses = [len(one.uses) for one in compiled.kernels if "match" in one.binary.kernel]
    assert uses
    assert all(count == 3 for count in uses)


def test_the_list_says_what_each_takes(compiled, tmp_path):
    compiled.write(tmp_path)
    listed = json.loads((tmp_path / "kernels.json").read_text())
    assert listed["architecture"] == "sm_90"
    for one in listed["kernels"]:
        assert one["stack"] == 0
        assert one["registers"] > 0
        assert one["uses"][0]["grid"]
        assert (tmp_path / "kernels" / one["name"] / f"{one['kernel']}.cubin").stat().st_size > 0
    symbols = {
        name for one in listed["kernels"] for use in one["uses"] for size in use["grid"] for name in _symbols(size)
    }
    assert symbols
    assert symbols <= set(listed["sizes"])


def _symbols(size: str) -> set[str]:
    import sympy

    return {str(one) for one in sympy.sympify(size.replace("//", "/")).free_symbols}


def test_the_given_program_is_not_changed(fast):
    before = str(fast.graph.program.graph)
    for_gpu(fast.graph.program)
    assert str(fast.graph.program.graph) == before


def test_where_triton_is_missing_it_is_said(fast, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for compiles in (lambda: cross_compile(fast.graph.program, "sm_90"), lambda: for_gpu(fast.graph.program)):
        with pytest.raises(MissingDependency, match="needs the package 'triton'"):
            compiles()


INTERPRETED = """
import torch
from tamis.kernels.triton.ahead import compile_launch
from tamis.kernels.triton.architecture import Architecture
from tamis.kernels.triton.select import TWIN
from tamis.target_errors import KernelInterpreted

target = Architecture.named("sm_90")
(launch, *_), _ = TWIN.work(target, *next(iter(TWIN.examples())))
try:
    compile_launch(launch, target)
except KernelInterpreted as error:
    print(error)
"""


def test_kernels_that_are_interpreted_are_not_compiled():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # Triton asks when a kernel is defined
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not compiled for sm_90: Triton interprets kernels in this process" in done.stdout
    assert "hint: unset TRITON_INTERPRET" in done.stdout
