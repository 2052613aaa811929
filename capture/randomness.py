"""Random numbers drawn inside a model: what they do to a captured graph is said, not hidden."""

from __future__ import annotations

import logging

import torch
from torch import fx
from torch.export import ExportedProgram

from ..graph import source_line

log = logging.getLogger("tamis")
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default  # random only by its dropout, which is 0 here


def drawn(program: ExportedProgram) -> list[fx.Node]:
    """Nodes that draw random numbers at every call."""
    seeded = torch.Tag.nondeterministic_seeded
    return [n for n in program.graph.nodes if seeded in getattr(n.target, "tags", ()) and n.target is not ATTENTION]


def warn_of_draws(program: ExportedProgram, name: str) -> None:
    """One warning of the logger "tamis" that names the first node that draws (ViTMAE without `noise`)."""
    nodes = drawn(program)
    if nodes:
        message = (
            "%s: node %s%s draws random numbers at every call, so no two runs agree and a difference from the original "
            "says nothing; if forward takes these numbers as an input, pass them"
        )
        where = source_line(nodes[0])
        log.warning(message, name, nodes[0].name, f" ({where})" if where else "")
