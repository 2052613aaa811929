"""`cross_compile`: the kernels a program needs on a GPU that need not be here, compiled, and what they take of it.

What is written is a folder of entries of Triton's own cache, one per kernel, in which Triton on the target finds each
compiled, and `kernels.json`, which says what they are.  Kernels that Inductor makes of the rest of the graph are
compiled on the target.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, fx
from torch.export import ExportedProgram

from ..kernels.triton import need_triton
from ..kernels.triton.ahead import Binary, Signature, compile_launch
from ..kernels.triton.architecture import Architecture
from ..kernels.triton.launch import Launch
from ..kernels.triton.resources import Resources, resources_of
from .gpu import OnGpu, for_gpu
from .twins import Placed

FOLDER, LIST = "kernels", "kernels.json"


@dataclass(frozen=True)
class Use:
    """One launch of a kernel by one node; a grid's sizes that are not known before the run are symbols."""

    node: str
    op: str
    grid: tuple[str, ...]


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel, what it takes, and who launches it."""

    binary: Binary
    resources: Resources
    uses: tuple[Use, ...]

    def as_dict(self) -> dict[str, Any]:
        """Its entry in `kernels.json`."""
        signature = self.binary.signature
        return {
            "name": self.binary.name,
            "kernel": self.binary.kernel,
            "cache_key": self.binary.key,
            "signature": signature.types,
            "constants": signature.constants,
            "divisible_by_16": list(signature.aligned),
            **self.resources.as_dict(),
            "uses": [{"node": use.node, "op": use.op, "grid": list(use.grid)} for use in self.uses],
        }


@dataclass(frozen=True)
class CrossCompiled:
    """The kernels of a program on one architecture.

    kernels  compiled, each once
    lowered  the graph they belong to, what was fused in it, and which nodes have no kernel
    """

    architecture: str
    kernels: tuple[Kernel, ...]
    lowered: OnGpu

    def as_dict(self) -> dict[str, Any]:
        """The content of `kernels.json`."""
        import triton

        return {
            "architecture": self.architecture,
            "versions": {"triton": triton.__version__, "torch": str(torch.__version__)},
            "sizes": _legend(self.lowered.graph),
            "kernels": [one.as_dict() for one in self.kernels],
            "fused": [one.as_dict() for one in self.lowered.fired],
            "by_reference": [
                {"node": one.node, "op": one.op.name, "reason": one.reason} for one in self.lowered.placed if one.reason
            ],
        }

    def headline(self) -> str:
        """One line on what was compiled, what it takes, and what has no kernel."""
        spilling = [one.binary.kernel for one in self.kernels if one.resources.stack]
        most = max((one.resources.registers for one in self.kernels), default=0)
        words = [f"{len(self.kernels)} kernels for {self.architecture}", f"at most {most} registers a thread"]
        words.append(f"spilling: {', '.join(sorted(set(spilling)))}" if spilling else "none spills")
        left = sum(1 for one in self.lowered.placed if one.reason)
        return ", ".join(words) + (f"; {left} nodes have no kernel (kernels.json says why)" if left else "")

    def write(self, folder: Path) -> None:
        """Write `kernels.json` and the folder `kernels` into a folder, which must have neither."""
        for one in self.kernels:
            entry = folder / FOLDER / one.binary.name
            entry.mkdir(parents=True)
            for name, content in one.binary.files.items():
                (entry / name).write_bytes(content)
        (folder / LIST).write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")


def cross_compile(program: ExportedProgram, architecture: str) -> CrossCompiled:
    """Compile every kernel that the program needs on an architecture (`sm_90`, `gfx942`), each once.

    Raises:
        MissingDependency: Triton is not installed.
        KernelInterpreted: TRITON_INTERPRET is set.
        KernelNotCompiled: Triton refuses one of them.
    """
    need_triton()
    target, lowered = Architecture.named(architecture), for_gpu(program)
    found: dict[str, tuple[Launch, list[Use]]] = {}
    for placed in lowered.placed:
        for launch in _launches(placed, target):
            use = Use(placed.node, placed.op.name, tuple(map(str, launch.grid)))
            found.setdefault(_specialised(launch, target), (launch, []))[1].append(use)
    with ThreadPoolExecutor() as pool:  # the assembler is a process of its own
        binaries = pool.map(lambda one: compile_launch(one[0], target), found.values())
        kernels = [
            Kernel(binary, resources_of(binary), tuple(uses))
            for binary, (_, uses) in zip(binaries, found.values(), strict=True)
        ]
    return CrossCompiled(architecture, tuple(kernels), lowered)


def _launches(placed: Placed, architecture: Architecture) -> list[Launch]:
    return [] if placed.twin is None else placed.twin.work(architecture, *placed.arguments)[0]


def _specialised(launch: Launch, architecture: Architecture) -> str:
    return f"{launch.name}{Signature.of(launch, architecture)}{launch.config}"


def _legend(graph: fx.Graph) -> dict[str, str]:
    """What the symbols of grids are: sizes of inputs, and counts after reductions."""
    legend: dict[str, str] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            for axis, size in enumerate(getattr(value, "shape", ())):
                if isinstance(size, SymInt) and len(size.node.expr.free_symbols) == 1:
                    legend.setdefault(str(size), f"{node.name}.shape[{axis}]")
        elif isinstance(value, SymInt) and "token_count" in str(node.target):
            legend.setdefault(str(value), f"tokens after {node.name}")
    return legend
