"""Example inputs for an ONNX file: from declared shapes and types, and from what the graph does with an input."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from ...onnx_errors import TypeUnsupported
from ..dims import Axes
from .module import OnnxModule, identifiers
from .tensors import DTYPES, HINT

ROWS = 2  # of the first dimension, where it is dynamic
LENGTH = 16  # of any other dynamic dimension
BEFORE_LOOKUP = {"Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape"}
COUNTING = 0  # generator seed


@dataclass(frozen=True)
class Example:
    """Inputs to call a module with, and the names of their dynamic dimensions.

    args  one tensor per input, in the file's order
    axes  per input {dimension: name}, the names being the file's, made identifiers
    dims  the same with the file's own names; a dimension without a name has None
    """

    args: tuple[Tensor, ...]
    axes: Axes
    dims: tuple[dict[int, str], ...]


def example_of(module: OnnxModule, path: str) -> Example:
    """Make inputs.

    Integers that look rows up in a table are within the table; other integers and truth values (masks) are ones;
    floats are normal.  Dynamic first dimensions are 2, others 16.

    Raises:
        TypeUnsupported: an input is a list, or has no declared rank.
    """
    dims = tuple(_dynamic(value, path) for value in module.inputs)
    generator = torch.Generator().manual_seed(COUNTING)
    args = tuple(_tensor(value, names, generator, module) for value, names in zip(module.inputs, dims, strict=True))
    return Example(args, Axes(_as_identifiers(dims)), dims)


def _dynamic(value: ir.Value, path: str) -> dict[int, str]:
    """{dimension: name} of an input's dimensions without a fixed size."""
    where = f"input {value.name!r}"
    if not isinstance(value.type, ir.TensorType):
        raise TypeUnsupported(path=path, where=where, got="list", hint=HINT)
    if value.shape is None:
        hint = "write a shape into the file, with names for its dynamic dimensions."
        raise TypeUnsupported(path=path, where=where, got="unknown rank", hint=hint)
    return {
        axis: size.value or f"{value.name}_{axis}"
        for axis, size in enumerate(value.shape)
        if isinstance(size, ir.SymbolicDim)
    }


def _as_identifiers(dims: tuple[dict[int, str], ...]) -> tuple[dict[int, str], ...]:
    names = list(dict.fromkeys(name for one in dims for name in one.values()))
    plain = dict(zip(names, identifiers(re.sub(r"\W+", "_", name) for name in names), strict=True))
    return tuple({axis: plain[name] for axis, name in one.items()} for one in dims)


def _tensor(value: ir.Value, names: dict[int, str], generator: torch.Generator, module: OnnxModule) -> Tensor:
    assert value.shape is not None
    sizes = [
        (ROWS if axis == 0 else LENGTH) if axis in names else int(n)  # type: ignore[arg-type]
        for axis, n in enumerate(value.shape)
    ]
    dtype = DTYPES[int(value.dtype)]  # type: ignore[arg-type]
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    rows = _table_rows(value, module)
    if rows is None:
        return torch.ones(sizes, dtype=dtype)
    return torch.randint(rows, sizes, generator=generator).to(dtype)


def _table_rows(value: ir.Value, module: OnnxModule) -> int | None:
    """Rows of the smallest table that a value looks rows up in; None when it does not."""
    found = []
    pending = [value]
    while pending:
        for node, place in pending.pop().uses():
            if node.op_type == "Gather" and place == 1 and (table := module.shape_of(node.inputs[0])) is not None:
                axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                found.append(table[axis])
            elif node.op_type in BEFORE_LOOKUP and place == 0:
                pending.extend(node.outputs)
    return min(found, default=None)
