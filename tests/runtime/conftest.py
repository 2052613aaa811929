"""Toy passes for every test of the runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys import PASSES, toy_compiled, toy_graph

from tamis import capture
from tamis.runtime.compiled import CompiledModel


@pytest.fixture(autouse=True)
def toy_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the toy passes for one test."""
    from tamis.registry import _REGISTRY

    for name, cls in PASSES.items():
        monkeypatch.setattr(cls, "name", name)
        monkeypatch.setitem(_REGISTRY, name, cls)


@pytest.fixture
def compiled(toy_passes: None) -> CompiledModel:
    """The toy with its logits scaled by 1.1."""
    return toy_compiled()


@pytest.fixture
def workplace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory with a toy.pt2, and a capture that knows toys."""
    monkeypatch.chdir(tmp_path)
    torch.export.save(toy_graph().program, "toy.pt2")
    monkeypatch.setattr(capture, "capture", lambda *args, **kwargs: toy_graph())
    return tmp_path
