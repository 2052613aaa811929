"""Example inputs for an ONNX file: from declared shapes and types, and from what the graph does with an input."""

from __future__ import annotations

import ast
import itertools
import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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
AMBIGUOUS = 3  # names of lengths from which on one may be the sum of others
COUNTING = 0  # generator seed
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


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
    floats are normal.  Dynamic first dimensions are 2, others 16; one whose name is a formula of other names, such as
    `past + new`, is what it says.  Of three names or more one may be the sum of two others without saying so: where
    the module does not run, sums are tried.

    Raises:
        TypeUnsupported: an input is a list, or has no declared rank.
    """
    dims = tuple(_dynamic(value, path) for value in module.inputs)
    sizes = _sizes(dims)
    lengths = list(dict.fromkeys(name for one in dims for axis, name in one.items() if axis))
    args = _tensors(module, dims, sizes)
    if len(lengths) >= AMBIGUOUS and not _runs(module, args):
        sums = ({**sizes, one: sizes[a] + sizes[b]} for one, a, b in _three_of(lengths))
        args = next((made for some in sums if _runs(module, made := _tensors(module, dims, some))), args)
    return Example(args, Axes(_as_identifiers(dims)), dims)


def _three_of(names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Each name with each pair of others."""
    for one in names:
        for a, b in itertools.combinations([name for name in names if name != one], 2):
            yield one, a, b


def _runs(module: OnnxModule, args: tuple[Tensor, ...]) -> bool:
    try:
        with torch.no_grad():
            module(*args)
    except Exception:  # whatever it is: these sizes are not the ones
        return False
    return True


def _tensors(module: OnnxModule, dims: Iterable[dict[int, str]], sizes: dict[str, int]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(COUNTING)
    return tuple(
        _tensor(value, {axis: sizes[name] for axis, name in names.items()}, generator, module)
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


def _sizes(dims: Iterable[dict[int, str]]) -> dict[str, int]:
    """A size for every name."""
    sizes: dict[str, int] = {}
    for axis, name in (item for names in dims for item in names.items()):
        sizes.setdefault(name, ROWS if axis == 0 else LENGTH)
    formulas = {name: _formula(name) for name in sizes}
    plain = {name: size for name, size in sizes.items() if isinstance(formulas[name], ast.Name | None)}
    return {name: plain[name] if name in plain else _computed(formulas[name], plain) or sizes[name] for name in sizes}


def _formula(name: str) -> ast.expr | None:
    """A name, read as Python would; None where it is no expression."""
    try:
        return ast.parse(name.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return None


def _computed(formula: Any, sizes: dict[str, int]) -> int | None:
    """What a formula of names and integers gives; None where it is something else, or no size."""
    match formula:
        case ast.Name(id=name):
            return sizes.get(name)
        case ast.Constant(value=int(number)):
            return number
        case ast.BinOp(left=a, op=how, right=b) if type(how) in OPERATORS:
            x, y = _computed(a, sizes), _computed(b, sizes)
            if x is not None and y is not None and (y or not isinstance(how, ast.FloorDiv)):
                return int(OPERATORS[type(how)](x, y))
    return None


def _as_identifiers(dims: tuple[dict[int, str], ...]) -> tuple[dict[int, str], ...]:
    names = list(dict.fromkeys(name for one in dims for name in one.values()))
    plain = dict(zip(names, identifiers(re.sub(r"\W+", "_", name) for name in names), strict=True))
    return tuple({axis: plain[name] for axis, name in one.items()} for one in dims)


def _tensor(value: ir.Value, dynamic: dict[int, int], generator: torch.Generator, module: OnnxModule) -> Tensor:
    assert value.shape is not None
    sizes = [dynamic.get(axis, n) for axis, n in enumerate(value.shape)]
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
