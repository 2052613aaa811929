"""What holds for all tests: those marked `gpu` are skipped where there is no CUDA device."""

from __future__ import annotations

import gc
import sys

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch  # only here: tests that need no torch should not wait for it

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """What all tests would pay again and again: exports of reading torchlib, the collector of what libraries made."""
    if "onnxscript" in sys.modules:
        from quick_exports import share_torchlib

        share_torchlib()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20)
