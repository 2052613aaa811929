"""Exports of one process share what torch.onnx reads anew each time: a third of exporting a small model."""

from __future__ import annotations

import functools
from typing import Any


def share_torchlib() -> None:
    """From now on the sources of torchlib's functions are parsed once for each opset, not at every export."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    whole = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(*args: Any, **kwargs: Any) -> ONNXRegistry:
        """A registry of its own, as an export adds its custom translations to it."""
        known, registry = whole(*args, **kwargs), ONNXRegistry()
        registry.__dict__.update(known.__dict__, functions={key: list(metas) for key, metas in known.functions.items()})
        return registry

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)  # type: ignore[method-assign,assignment]
