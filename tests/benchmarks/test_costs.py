"""What compiling and exporting cost, at small sizes: counts exactly, time and memory as a busy machine allows."""

from __future__ import annotations

from pathlib import Path

import compile_time
import large_file
import pytest

FIXED = 150  # MB that tracing and the libraries take whatever the model is


# Compiling from nothing, twice: that layers share kernels, and that passes take less time than an export, is tested at
# every change by tests/lowering/test_callables.py and tests/test_traps.py.
@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, float]]:
    """Dense and reduced, each compiled in a process of its own."""
    pytest.importorskip("timm")
    return {kind: compile_time.child("vit_tiny_4", kind) for kind in compile_time.KINDS}


@pytest.mark.full
def test_a_reduced_model_has_no_more_kernels_than_the_dense_one(compiled: dict[str, dict[str, float]]) -> None:
    assert 0 < compiled["reduced"]["kernels"] <= compiled["dense"]["kernels"]


@pytest.mark.full
def test_a_reduced_model_compiles_in_twice_the_time(compiled: dict[str, dict[str, float]]) -> None:
    """The goal of 2x, without what is paid once; measured 0.8x."""
    assert compiled["reduced"]["reduced"] < 2 * compiled["dense"]["dense"]


def test_memory_of_an_export_is_three_times_the_file(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    size = (3, 768)
    imports, exported = (large_file.child(way, tmp_path, size) for way in ("import", "module"))
    assert exported["written_mb"] > 85
    assert exported["peak_mb"] - imports["peak_mb"] < 3 * exported["written_mb"] + FIXED


def test_kernels_are_counted_where_they_are_defined() -> None:
    code = "x = 1\ncpp_fused_add_0 = async_compile.cpp_pybinding(['float*'], r'''\ncpp_fused_add_0(buf)\n"
    assert compile_time.definitions(code) == ["cpp_fused_add_0 = async_compile.cpp_pybinding(['float*'], r'''"]
