"""`for_gpu`: a program as it runs on a GPU: chains fused into kernels of ours, ops with kernels launched."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.export import ExportedProgram

from ..capture.program import copied, rebuild
from .fusion import Fired, fuse
from .twins import Placed, place_twins


@dataclass(frozen=True)
class OnGpu:
    """A program for a GPU, and how it came to be.

    program  ops that have kernels are `tamis_triton` nodes, the others as they were
    fired    what every fusion did, and where it did not and why
    placed   what became of every tamis node
    """

    program: ExportedProgram
    fired: tuple[Fired, ...]
    placed: tuple[Placed, ...]

    @property
    def graph(self) -> fx.Graph:
        """Of the program."""
        return self.program.graph


def for_gpu(program: ExportedProgram) -> OnGpu:
    """Fuse and place kernels; the given program is not changed."""
    module = copied(program)
    fired = fuse(module.graph)
    placed = place_twins(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return OnGpu(rebuild(program, module), tuple(fired), tuple(placed))
