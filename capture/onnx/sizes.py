"""Sizes of the dynamic dimensions of a file's inputs at which the file can be run."""

from __future__ import annotations

import ast
import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from .module import OnnxModule
from .nodes import integers

ROWS = 2  # of the first dimension, where it is dynamic
LENGTH = 16  # of any other dynamic dimension
FEW, MANY = 4, 64  # steps of a convolution along an image: usually, and along the longest that is tried
AMBIGUOUS = 3  # names of lengths from which on one may be the sum of others
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}
Dims = tuple[dict[int, str], ...]  # per input {axis: name}
Runs = Callable[[dict[str, int]], bool]


@dataclass(frozen=True)
class Convolution:
    """What convolves an input: how many channels it takes, and its steps along the further axes."""

    names: dict[int, str]
    channels: int
    steps: list[int]

    def image(self, steps: int) -> dict[str, int]:
        """Sizes of the dynamic axes of an image of so many steps each way."""
        return {name: steps * self.steps[axis - 2] for axis, name in self.names.items() if axis >= 2}


def find_sizes(module: OnnxModule, dims: Dims, runs: Runs) -> tuple[dict[str, int], set[str]]:
    """A size for every name, and names that stand for that size only, whatever the file declares.

    First dimensions are 2, others 16; a formula of other names, such as `past + new`, is what it says; what is
    convolved has as many channels as the weight takes, and at least 4 steps each way.  Where that does not run (`runs`
    says it of sizes), one of three names or more may be the sum of two others, or images may have one size: square
    ones of 2 to 64 steps are tried.
    """
    convolutions = list(_convolutions(module, dims))
    sizes = {**_usual(dims), **{one.names[1]: one.channels for one in convolutions if 1 in one.names}}
    images = [one for one in convolutions if one.image(1)]
    for one in images:
        sizes |= {name: max(size, LENGTH) for name, size in one.image(FEW).items()}
    tried = [sizes, *_sums(dims, sizes)]
    tried += [{**sizes, **one.image(steps)} for one in images for steps in range(2, MANY + 1)]
    if len(tried) > 1:
        sizes = next((some for some in tried if runs(some)), sizes)
    fixed = {one.names[1] for one in convolutions if 1 in one.names}
    for one in images:
        larger = {name: sizes[name] + step for name, step in one.image(1).items()}
        fixed |= set() if runs({**sizes, **larger}) else larger.keys()
    return sizes, fixed


def _sums(dims: Dims, sizes: dict[str, int]) -> Iterator[dict[str, int]]:
    """Sizes of which one is the sum of two others."""
    names = list(dict.fromkeys(name for one in dims for axis, name in one.items() if axis))
    for one in names if len(names) >= AMBIGUOUS else []:
        for a, b in itertools.combinations([name for name in names if name != one], 2):
            yield {**sizes, one: sizes[a] + sizes[b]}


def _convolutions(module: OnnxModule, dims: Dims) -> Iterator[Convolution]:
    """What convolves inputs first thing."""
    for value, names in zip(module.inputs, dims, strict=True):
        pending: list[ir.Value] = [value]
        while pending:
            for node, place in pending.pop().uses():
                if node.op_type in ("Cast", "Identity") and place == 0:
                    pending.extend(node.outputs)
                found = _convolution(node, names, module) if node.op_type == "Conv" and place == 0 else None
                if found is not None:
                    yield found


def _convolution(node: ir.Node, names: dict[int, str], module: OnnxModule) -> Convolution | None:
    """What a node convolves; None where its weight is computed, or it is wrong in itself, which running it tells."""
    shape = module.shape_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if shape is None or not max(names, default=0) < len(shape) > 1:
        return None
    group, steps = integers(node, "group") or [1], integers(node, "strides") or [1] * (len(shape) - 2)
    fits = len(steps) == len(shape) - 2 and min((*group, *steps)) > 0
    return Convolution(names, shape[1] * group[0], steps) if fits else None


# --- formulas -------------------------------------------------------------------------------------------------------


def _usual(dims: Dims) -> dict[str, int]:
    """A size for every name, from its place or from what it says."""
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
