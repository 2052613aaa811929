"""Example inputs for an ONNX file: from declared shapes and types, and from what the graph does with an input."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from ...onnx_errors import MalformedGraph, TypeUnsupported
from ..dims import Axes
from .module import OnnxModule, identifiers
from .nodes import integers
from .reader import LARGEST
from .sizes import Dims, find_sizes
from .tensors import DTYPES, HINT

log = logging.getLogger("tamis")
LOOKUPS = {"Gather": {1: 0}, "EmbedLayerNormalization": {0: 2, 1: 4, 8: 3}, "QEmbedLayerNormalization": {0: 2, 1: 4}}
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
    dims: Dims


def example_of(module: OnnxModule, path: str) -> Example:
    """Make inputs.

    Integers that look rows up in a table are within the table; other integers and truth values (masks) are ones;
    floats are normal.  Of what size they are, and which dimensions are not dynamic after all, see `find_sizes`.

    Raises:
        TypeUnsupported: an input is a list, or has no declared rank.
        MalformedGraph: it would have more than 2^28 entries.
    """
    dims = tuple(_dynamic(value, path) for value in module.inputs)

    def made(sizes: dict[str, int]) -> tuple[Tensor, ...]:
        return _tensors(module, dims, sizes, path)

    sizes, fixed = find_sizes(module, dims, lambda some: _runs(module, made(some)))
    for name in sorted(fixed):
        log.warning(
            "%s: the %s dimension is static at %d: the model does not work at other sizes", path, name, sizes[name]
        )
    free = tuple({axis: name for axis, name in names.items() if name not in fixed} for names in dims)
    return Example(made(sizes), Axes(_as_identifiers(free)), free)


def _runs(module: OnnxModule, args: tuple[Tensor, ...]) -> bool:
    try:
        with torch.no_grad():
            module(*args)
    except Exception:  # whatever it is: these sizes are not the ones
        return False
    return True


def _tensors(module: OnnxModule, dims: Dims, sizes: dict[str, int], path: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(COUNTING)
    return tuple(
        _tensor(value, {axis: sizes[name] for axis, name in names.items()}, generator, module, path)
        for value, names in zip(module.inputs, dims, strict=True)
    )


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


def _as_identifiers(dims: Dims) -> Dims:
    names = list(dict.fromkeys(name for one in dims for name in one.values()))
    plain = dict(zip(names, identifiers(re.sub(r"\W+", "_", name) for name in names), strict=True))
    return tuple({axis: plain[name] for axis, name in one.items()} for one in dims)


def _tensor(
    value: ir.Value, dynamic: dict[int, int], generator: torch.Generator, module: OnnxModule, path: str
) -> Tensor:
    assert value.shape is not None
    sizes: list[Any] = [dynamic.get(axis, n) for axis, n in enumerate(value.shape)]
    if math.prod(sizes) > LARGEST:
        reason = f"input {value.name!r} would have sizes {sizes}: more than {LARGEST} entries"
        raise MalformedGraph(path=path, reason=reason)
    dtype = DTYPES[int(value.dtype)]  # type: ignore[arg-type]
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    rows = _table_rows(value, module)
    if not rows:
        return torch.ones(sizes, dtype=dtype)
    return torch.randint(rows, sizes, generator=generator).to(dtype)


def _table_rows(value: ir.Value, module: OnnxModule) -> int | None:
    """Rows of the smallest table that a value looks rows up in; None when it does not."""
    found = []
    pending = [value]
    while pending:
        for node, place in pending.pop().uses():
            holder = LOOKUPS.get(node.op_type, {}).get(place)
            if holder is not None:
                axis = (integers(node, "axis") or [0])[0]
                table = module.shape_of(node.inputs[holder]) if holder < len(node.inputs) else None
                found += [] if table is None else list(table[axis : axis + 1 or None])  # none where it has no such axis
            elif node.op_type in BEFORE_LOOKUP and place == 0:
                pending.extend(node.outputs)
    return min(found, default=None)
