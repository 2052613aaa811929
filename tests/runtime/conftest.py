"""Toy passes for every test of the runtime."""

from __future__ import annotations

import pytest
from toys import PASSES, toy_compiled

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
