"""`Architecture`: what a kernel may use on a GPU, and the block sizes measured best there.

All that differs between architectures is data: the limits below and the files in `tables/`, which `scripts/tune`
fills.  An architecture without a file, and a kernel that its file does not name, get the table `default`, which is
chosen to compile within everyone's limits, not to be fast.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "tables"
NAMES_OF_OPTIONS = {"warps": "num_warps", "stages": "num_stages"}


@dataclass(frozen=True)
class Config:
    """Constants of a kernel (`tl.constexpr`) by name, and how it is launched: warps and pipeline stages per program."""

    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """As Triton names them."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    @staticmethod
    def of_entry(entry: dict[str, Any]) -> Config:
        """As a table has it: constants, warps and stages side by side."""
        options = {name: entry[name] for name in NAMES_OF_OPTIONS if name in entry}
        return Config({name: value for name, value in entry.items() if name not in options}, **options)

    def as_entry(self) -> dict[str, Any]:
        """As a table has it."""
        return {**self.constants, "warps": self.warps, "stages": self.stages}

    def having(self, **constants: Any) -> Config:
        """With more constants."""
        return Config({**self.constants, **constants}, self.warps, self.stages)


@dataclass(frozen=True)
class Architecture:
    """One GPU architecture.

    name           sm_90, gfx942, or "interpreter"
    backend, code  as Triton's GPUTarget takes them: "cuda" and 90, "hip" and "gfx942"
    warp           threads per warp
    shared         bytes of shared memory that one program may use
    registers      of 32 bits per multiprocessor
    overrides      entries that come before the tables';  asked: where entries that are read are written down
    """

    name: str
    backend: str = ""
    code: Any = None
    warp: int = 32
    shared: int = 65536
    registers: int = 65536
    overrides: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict, hash=False)
    asked: list[tuple[str, str]] | None = field(default=None, hash=False, compare=False)

    def having(self, kernel: str, key: str, config: Config) -> Architecture:
        """With another configuration in place of one of the table's: how a tuner tries it."""
        return replace(self, overrides={kernel: {key: config.as_entry()}})

    def watched(self, asked: list[tuple[str, str]]) -> Architecture:
        """One that writes down which entries (kernel, key) of its tables are read."""
        return replace(self, asked=asked)

    @staticmethod
    def named(name: str) -> Architecture:
        """Of a target's name (`sm_90`, `gfx942`); one not in the list gets cautious limits."""
        if name in KNOWN:
            return KNOWN[name]
        if name.startswith("sm_"):
            return Architecture(name, "cuda", int(name[3:].rstrip("a")), shared=101376)
        return Architecture(name, "hip", name, warp=64)

    @staticmethod
    def of(device: Any) -> Architecture:
        """Of a torch device; CPU tensors run in Triton's interpreter."""
        import torch

        if device.type != "cuda":
            return KNOWN["interpreter"]
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return Architecture.named(properties.gcnArchName.split(":")[0])
        return Architecture.named(f"sm_{properties.major}{properties.minor}")

    def config(self, kernel: str, *keys: str) -> Config:
        """Block sizes, warps and stages of a kernel: of the first key that the architecture's table has, then of "*".

        Keys go from the special to the general, such as `"d64-float16", "d64"`.  Raises KeyError for a kernel that no
        table names.
        """
        for table in (self.overrides, _table(self.name), _table("default")):
            entries = table.get(kernel, {})
            for key in (*keys, "*"):
                if key in entries:
                    if self.asked is not None:
                        self.asked.append((kernel, key))
                    return Config.of_entry(entries[key])
        raise KeyError(f"no block sizes for {kernel} {keys} in {TABLES.name}/{self.name}.json or default.json")


KNOWN = {
    one.name: one
    for one in (
        Architecture("interpreter"),
        Architecture("sm_80", "cuda", 80, shared=166912),
        Architecture("sm_90", "cuda", 90, shared=232448),
        Architecture("sm_100", "cuda", 100, shared=232448),
        Architecture("gfx942", "hip", "gfx942", warp=64, shared=65536, registers=131072),
    )
}


@functools.cache
def _table(name: str) -> dict[str, dict[str, dict[str, Any]]]:
    path = TABLES / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}
