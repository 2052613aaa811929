"""Where a lowered model is to run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import UnknownTarget

# those that Triton compiles for; a compiler given another one ends the process
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950")


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
        if not isinstance(text, str):
            raise UnknownTarget(text=text, known=", ".join(ARCHITECTURES))
        match = re.fullmatch(r"(cpu|cuda|cuda:(sm_\d+)|rocm:(gfx\w+))", text)
        arch = match and (match[2] or match[3])
        if match is None or (arch and arch not in ARCHITECTURES):
            raise UnknownTarget(text=text, known=", ".join(ARCHITECTURES))
        return Target(text.split(":")[0], arch)

    @staticmethod
    def named(arch: str) -> Target:
        """Of an architecture's name alone (`sm_90`), or with its kind (`cuda:sm_90`); raises UnknownTarget."""
        if isinstance(arch, str) and ":" not in arch:
            arch = f"{'rocm' if arch.startswith('gfx') else 'cuda'}:{arch}"
        return Target.parse(arch)

    def __str__(self) -> str:
        return f"{self.device}:{self.arch}" if self.arch else self.device
