"""Operations on known values: arithmetic on sizes, in numpy, over Python integers and symbols alike.

Each function has the operation's inputs as arrays (objects where there are symbols) and its attributes as keywords,
and answers with a `Known`, an array of the first input's type, or None where it cannot: the tensor function runs then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import SymBool, SymFloat, SymInt

from .known import SMALL, Array, Known
from .tensors import DTYPES

Result = Known | Array | tuple[Array, ...] | None
FUNCTIONS: dict[str, Callable[..., Result]] = {}
SYMBOLS = (SymInt, SymFloat, SymBool)


def arithmetic(*names: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register a function for operations of the standard domain."""

    def add(function: Callable[..., Result]) -> Callable[..., Result]:
        FUNCTIONS.update(dict.fromkeys(names, function))
        return function

    return add


def is_symbolic(array: Array) -> bool:
    """Whether an array holds symbols."""
    return array.dtype == object


def _each(function: Callable[..., Any], *arrays: Array) -> Array:
    """Apply a function of Python numbers and symbols to all entries."""
    return np.asarray(np.frompyfunc(function, len(arrays), 1)(*arrays), dtype=object)


def _binary(numbers: Callable[..., Any], symbols: Callable[..., Any]) -> Callable[..., Result]:
    def function(a: Array, b: Array) -> Result:
        if is_symbolic(a) or is_symbolic(b):
            return _each(symbols, a.astype(object), b.astype(object))
        return np.asarray(numbers(a, b))

    return function


def _quotient(a: Any, b: Any) -> Any:
    """Division as ONNX has it: exact for floats, towards zero for integers."""
    if isinstance(a, float | SymFloat) or isinstance(b, float | SymFloat):
        return a / b
    if bool(a >= 0) == bool(b > 0):
        return a // b
    return -(-a // b)


def _divided(a: Array, b: Array) -> Array:
    if a.dtype.kind not in "iu":
        return np.asarray(a / b)
    quotient = np.abs(a) // np.abs(b)
    return np.asarray(np.where((a < 0) != (b < 0), -quotient, quotient))


FUNCTIONS["Add"] = _binary(np.add, lambda a, b: a + b)
FUNCTIONS["Sub"] = _binary(np.subtract, lambda a, b: a - b)
FUNCTIONS["Mul"] = _binary(np.multiply, lambda a, b: a * b)
FUNCTIONS["Div"] = _binary(_divided, _quotient)


def _compared(numbers: Callable[..., Any], symbols: Callable[..., Any]) -> Callable[..., Result]:
    """A comparison; between symbols it is decided, which adds a guard only where ranges do not decide it."""
    function = _binary(numbers, lambda a, b: bool(symbols(a, b)))
    return lambda a, b: Known.of(function(a, b), torch.bool)


FUNCTIONS["Equal"] = _compared(np.equal, lambda a, b: a == b)
FUNCTIONS["Less"] = _compared(np.less, lambda a, b: a < b)
FUNCTIONS["LessOrEqual"] = _compared(np.less_equal, lambda a, b: a <= b)
FUNCTIONS["Greater"] = _compared(np.greater, lambda a, b: a > b)
FUNCTIONS["GreaterOrEqual"] = _compared(np.greater_equal, lambda a, b: a >= b)
FUNCTIONS["And"] = _binary(np.logical_and, lambda a, b: bool(a) and bool(b))
FUNCTIONS["Or"] = _binary(np.logical_or, lambda a, b: bool(a) or bool(b))


@arithmetic("Mod")
def _mod(a: Array, b: Array, *, fmod: int = 0) -> Result:
    if is_symbolic(a) or is_symbolic(b):
        return _each(lambda x, y: x % y, a.astype(object), b.astype(object)) if not fmod else None
    return np.asarray(np.fmod(a, b) if fmod else np.mod(a, b))


@arithmetic("Min")
def _min(*arrays: Array) -> Result:
    return _folded(np.minimum, torch.sym_min, arrays)


@arithmetic("Max")
def _max(*arrays: Array) -> Result:
    return _folded(np.maximum, torch.sym_max, arrays)


def _folded(numbers: Any, symbols: Any, arrays: tuple[Array, ...]) -> Array:
    total = arrays[0]
    for array in arrays[1:]:
        mixed = is_symbolic(total) or is_symbolic(array)
        total = _each(symbols, total.astype(object), array.astype(object)) if mixed else numbers(total, array)
    return np.asarray(total)


@arithmetic("Neg")
def _neg(x: Array) -> Result:
    return -x


@arithmetic("Not")
def _not(x: Array) -> Result:
    return np.logical_not(x)


@arithmetic("Identity")
def _identity(x: Array) -> Result:
    return x


@arithmetic("Floor")
def _floor(x: Array) -> Result:
    return _each(lambda v: torch.sym_float(math.floor(v)), x) if is_symbolic(x) else np.floor(x)


@arithmetic("Ceil")
def _ceil(x: Array) -> Result:
    return _each(lambda v: torch.sym_float(math.ceil(v)), x) if is_symbolic(x) else np.ceil(x)


@arithmetic("Sqrt")
def _sqrt(x: Array) -> Result:
    return None if is_symbolic(x) else np.sqrt(x)


@arithmetic("Pow")
def _pow(x: Array, y: Array) -> Result:
    return None if is_symbolic(x) or is_symbolic(y) or x.dtype.kind in "iu" else np.asarray(x**y).astype(x.dtype)


@arithmetic("Cast")
def _cast(x: Array, *, to: int, saturate: int = 1, round_mode: str = "up") -> Result:
    dtype = DTYPES.get(to)
    if dtype is None or (not is_symbolic(x) and x.dtype.kind == "f" and not np.isfinite(x).all()):
        return None
    if not is_symbolic(x):
        return Known.of(x, dtype) if _castable(x, dtype) else None
    if dtype.is_floating_point:
        return Known.of(_each(torch.sym_float, x), dtype)
    if dtype == torch.bool:
        return None
    return Known.of(_each(lambda v: torch.sym_int(v) if isinstance(v, float | SymFloat) else v, x), dtype)


def _castable(x: Array, dtype: torch.dtype) -> bool:
    """Whether numpy and torch agree: types that numpy has, and integers that fit."""
    if dtype not in (torch.bool, torch.float32, torch.float64, torch.int32, torch.int64):
        return False
    if dtype.is_floating_point or dtype == torch.bool or not x.size:
        return True
    limits = torch.iinfo(dtype)
    return bool(limits.min <= x.min().item() and x.max().item() <= limits.max)


@arithmetic("Where")
def _where(condition: Array, x: Array, y: Array) -> Result:
    if is_symbolic(condition):
        return None
    if is_symbolic(x) or is_symbolic(y):
        x, y = x.astype(object), y.astype(object)
    return np.where(condition, x, y)


@arithmetic("Shape")
def _shape(x: Array, *, start: int = 0, end: int | None = None) -> Result:
    return Known.of(np.array(x.shape[start:end], np.int64))


@arithmetic("Size")
def _size(x: Array) -> Result:
    return Known.of(np.array(x.size, np.int64))


@arithmetic("Gather")
def _gather(x: Array, index: Array, *, axis: int = 0) -> Result:
    return None if is_symbolic(index) else np.asarray(np.take(x, index.astype(np.int64), axis))


@arithmetic("Concat")
def _concat(*arrays: Array, axis: int = 0) -> Result:
    return np.concatenate(arrays, axis)


@arithmetic("Slice")
def _slice(x: Array, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Result:
    given = [np.asarray(one) for one in (starts, ends, axes, steps) if one is not None]
    if any(is_symbolic(one) for one in given):
        return None
    starts, ends = np.asarray(starts).tolist(), np.asarray(ends).tolist()
    axes = range(len(starts)) if axes is None else np.asarray(axes).tolist()
    steps = [1] * len(starts) if steps is None else np.asarray(steps).tolist()
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        before_first = step < 0 and end < -x.shape[axis]  # Python would read it from the end
        index[axis] = slice(start, None if before_first else end, step)
    return x[tuple(index)]


def _list(numbers: Any) -> tuple[int, ...]:
    return tuple(np.asarray(numbers).reshape(-1).tolist())


@arithmetic("Squeeze")
def _squeeze(x: Array, axes: Any = None) -> Result:
    return np.squeeze(x, None if axes is None else _list(axes))


@arithmetic("Unsqueeze")
def _unsqueeze(x: Array, axes: Any) -> Result:
    return np.expand_dims(x, _list(axes))


@arithmetic("Reshape")
def _reshape(x: Array, shape: Array, *, allowzero: int = 0) -> Result:
    if is_symbolic(shape):
        return None
    sizes = [x.shape[i] if size == 0 and not allowzero else size for i, size in enumerate(shape.tolist())]
    return x.reshape(sizes)


@arithmetic("Transpose")
def _transpose(x: Array, *, perm: list[int] | None = None) -> Result:
    return np.transpose(x, perm)


@arithmetic("Expand")
def _expand(x: Array, shape: Array) -> Result:
    if is_symbolic(shape) or int(np.prod(shape)) > SMALL:
        return None
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(shape.tolist())))


@arithmetic("ConstantOfShape")
def _constant_of_shape(shape: Array, *, value: Any = None) -> Result:
    if is_symbolic(shape) or int(np.prod(shape)) > SMALL or (value is not None and not isinstance(value, Known)):
        return None
    if value is None:
        return Known.of(np.zeros(shape.tolist(), np.float32))
    return Known.of(np.full(shape.tolist(), value.data.reshape(-1)[0]), value.dtype)


@arithmetic("Range")
def _range(start: Array, limit: Array, delta: Array) -> Result:
    if any(is_symbolic(one) or one.dtype.kind != "i" for one in (start, limit, delta)):
        return None
    numbers = range(start.item(), limit.item(), delta.item())
    return np.array(numbers, start.dtype) if len(numbers) <= SMALL else None


@arithmetic("ReduceProd")
def _prod(x: Array, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Result:
    return _reduced(np.prod, x, axes, keepdims, noop_with_empty_axes)


@arithmetic("ReduceSum")
def _sum(x: Array, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Result:
    return _reduced(np.sum, x, axes, keepdims, noop_with_empty_axes)


@arithmetic("ReduceMax")
def _reduce_max(x: Array, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Result:
    return None if is_symbolic(x) or not x.size else _reduced(np.max, x, axes, keepdims, noop_with_empty_axes)


@arithmetic("ReduceMin")
def _reduce_min(x: Array, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Result:
    return None if is_symbolic(x) or not x.size else _reduced(np.min, x, axes, keepdims, noop_with_empty_axes)


def _reduced(function: Any, x: Array, axes: Any, keepdims: int, noop: int) -> Result:
    if x.dtype.kind == "f":
        return None  # in which order floats are added is the tensor function's business
    over = None if axes is None or not np.size(axes) else tuple(np.asarray(axes).tolist())
    if over is None and noop:
        return x
    return np.asarray(function(x, axis=over, keepdims=bool(keepdims)))


@arithmetic("Split")
def _split(x: Array, split: Any = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int = 1) -> Result:
    if split is not None and is_symbolic(np.asarray(split)):
        return None
    if split is None:
        each = -(-x.shape[axis] // outputs)
        return tuple(np.split(x, [min(each * i, x.shape[axis]) for i in range(1, outputs)], axis))
    return tuple(np.split(x, np.cumsum(np.asarray(split))[:-1].tolist(), axis))
