"""Sizes as users read them: `f32[batch, sequence, 384]`, where a program has symbols (`s77`) for the first two."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .graph import shape_text

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SYMBOL = re.compile(r"\b[su]\d+\b")


def dimension_names(program: ExportedProgram) -> dict[str, str]:
    """What the symbols of the program's inputs are: `batch` (first axis) or `sequence` (another axis).

    Where inputs have axes of their own, later ones are `batch_2`, and so on.
    """
    names: dict[str, str] = {}
    user_inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in user_inputs:
            continue
        for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            if not isinstance(size, int) and str(size).isidentifier() and str(size) not in names:
                stem = "sequence" if axis else "batch"
                taken = sum(name.startswith(stem) for name in names.values())
                names[str(size)] = f"{stem}_{taken + 1}" if taken else stem
    return names


def named_shape(value: Any, program: ExportedProgram) -> str:
    """`shape_text` with names for symbols; one that no input has is a count of `tokens`."""
    names = dimension_names(program)
    return SYMBOL.sub(lambda found: names.get(found[0], "tokens"), shape_text(value))


def named(text: str, program: ExportedProgram) -> str:
    """A text, such as torch's own of an error, with names for the symbols of the program's inputs."""
    names = dimension_names(program)
    return SYMBOL.sub(lambda found: names.get(found[0], found[0]), text)
