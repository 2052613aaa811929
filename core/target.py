"""Where a lowered model is to run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import UnknownTarget


@dataclass(frozen=True)
class Target:
    """A device kind and, for GPUs, an architecture (sm_90, gfx942); arch None means the device at hand."""

    device: str
    arch: str | None = None

    @staticmethod
    def parse(text: str | Target) -> Target:
        """Read `auto`, `cpu`, `cuda`, `cuda:sm_90` or `rocm:gfx942`; raises UnknownTarget."""
        if isinstance(text, Target):
            return text
        if text == "auto":
            import torch

            return Target("cuda" if torch.cuda.is_available() else "cpu")
        match = re.fullmatch(r"(cpu|cuda|cuda:(sm_\d+a?)|rocm:(gfx\w+))", text)
        if match is None:
            raise UnknownTarget(text=text)
        return Target(text.split(":")[0], match[2] or match[3])

    def __str__(self) -> str:
        return f"{self.device}:{self.arch}" if self.arch else self.device
