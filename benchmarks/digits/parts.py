"""The trained parts that methods have for the digits ViT, by the method's name: every file but the model's own."""

from __future__ import annotations

from pathlib import Path

from .model import HERE, WEIGHTS

PARTS: dict[str, Path] = {path.stem: path for path in sorted(HERE.glob("*.safetensors")) if path != WEIGHTS}
FACTS = HERE / "parts.json"  # how `train_parts` made its own
