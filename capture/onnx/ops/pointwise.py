"""Element-wise arithmetic, comparisons and casts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..known import Known
from ..table import Number, Unsupported, Value, op, scalar_or_tensor, tensor
from ..tensors import DTYPES

WIDE = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}  # torch stores these, no more


def operands(a: Value, b: Value) -> tuple[Any, Any]:
    """Two operands of one type: tensors, or a tensor and a number, which keeps graphs as torch models have them."""
    if isinstance(a, Tensor):
        return a, scalar_or_tensor(b, a)
    if isinstance(b, Tensor):
        return scalar_or_tensor(a, b), b
    return tensor(a), tensor(b)


def widened(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compute on unsigned types that torch only stores in signed ones that hold them (uint64 modulo 2^64)."""

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        narrow = next((x.dtype for x in args if isinstance(x, Tensor) and x.dtype in WIDE), None)
        if narrow is None:
            return function(*args, **keywords)
        result = function(*(x.to(WIDE[narrow]) if isinstance(x, Tensor) else x for x in args), **keywords)
        return result if result.dtype == torch.bool else result.to(narrow)

    return call


def _binary(name: str, function: Callable[..., Any]) -> None:
    @op(name)
    def call(a: Value, b: Value) -> Tensor:
        return widened(function)(*operands(a, b))


def _divide(a: Any, b: Any) -> Any:
    whole = not (a.is_floating_point() if isinstance(a, Tensor) else b.is_floating_point())
    return torch.div(a, b, rounding_mode="trunc") if whole else a / b


_binary("Add", lambda a, b: b + a if not isinstance(a, Tensor) else a + b)
_binary("Sub", lambda a, b: a - b)
_binary("Mul", lambda a, b: b * a if not isinstance(a, Tensor) else a * b)
_binary("Div", lambda a, b: _divide(a if isinstance(a, Tensor) else torch.as_tensor(a, dtype=b.dtype), b))
_binary("Less", lambda a, b: a < b)
_binary("LessOrEqual", lambda a, b: a <= b)
_binary("Greater", lambda a, b: a > b)
_binary("GreaterOrEqual", lambda a, b: a >= b)
_binary("And", lambda a, b: torch.logical_and(*_tensors(a, b)))
_binary("Or", lambda a, b: torch.logical_or(*_tensors(a, b)))
_binary("Xor", lambda a, b: torch.logical_xor(*_tensors(a, b)))
_binary("BitwiseAnd", lambda a, b: a & b)
_binary("BitwiseOr", lambda a, b: a | b)
_binary("BitwiseXor", lambda a, b: a ^ b)


def _tensors(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Logic takes no numbers."""
    like = a if isinstance(a, Tensor) else b
    return tuple(x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=like.dtype) for x in (a, b))  # type: ignore[return-value]


@op("Equal")
def equal(a: Value, b: Value) -> Tensor:
    """Whether entries are equal."""
    return widened(lambda x, y: y == x if not isinstance(x, Tensor) else x == y)(*operands(a, b))


@op("Pow")
def power(a: Tensor, b: Value) -> Tensor:
    """`a ** b` in a's type; b may be of another type."""
    exponent: Any = b.number() if isinstance(b, Known) and b.data.size == 1 and b.data.ndim <= a.ndim else tensor(b)
    if a.is_floating_point():
        whole = isinstance(exponent, float) and exponent.is_integer() and abs(exponent) < 16
        return torch.pow(a, int(exponent) if whole else exponent).to(a.dtype)
    return torch.pow(a.double(), exponent).to(a.dtype)


@op("Mod")
def modulo(a: Value, b: Value, *, fmod: int = 0) -> Tensor:
    """Remainder with b's sign, or with a's (fmod)."""
    return widened(torch.fmod if fmod else torch.remainder)(*operands(a, b))


@op("BitShift")
def bit_shift(a: Tensor, b: Tensor, *, direction: str) -> Tensor:
    """Shift left or right, signed integers with their sign; counts that are no place in the type shift all out."""
    bits, count, width = a.to(torch.int64), b.to(torch.int64), a.dtype.itemsize * 8
    beyond = (count < 0) | (count >= width)
    within = torch.where(beyond, 0, count)
    if direction == "LEFT":
        return torch.where(beyond, 0, bits << within).to(a.dtype)
    if a.dtype.is_signed:
        return (bits >> torch.where(beyond, width - 1, within)).to(a.dtype)
    halved = (bits >> 1) & torch.iinfo(torch.int64).max  # the sign bit of a uint64 is a bit like others
    shifted = torch.where(within == 0, bits, halved >> (within - 1).clamp(min=0))
    return torch.where(beyond, 0, shifted).to(a.dtype)


@op("Max")
def maximum(*xs: Tensor) -> Tensor:
    """The largest of the entries."""
    return functools.reduce(widened(torch.maximum), xs)


@op("Min")
def minimum(*xs: Tensor) -> Tensor:
    """The smallest of the entries."""
    return functools.reduce(widened(torch.minimum), xs)


@op("Sum")
def total(*xs: Tensor) -> Tensor:
    """The sum of the inputs."""
    return functools.reduce(torch.add, xs)


@op("Mean")
def average(*xs: Tensor) -> Tensor:
    """The mean of the inputs."""
    return functools.reduce(torch.add, xs) / len(xs)


@op("Where")
def where(condition: Tensor, x: Value, y: Value) -> Tensor:
    """x where the condition holds, else y."""
    if not isinstance(x, Tensor) and not isinstance(y, Tensor):
        if x.data.ndim == y.data.ndim == 0 and x.dtype == torch.float32:
            return torch.where(condition, x.number(), y.number())
        x, y = tensor(x), tensor(y)
    return torch.where(condition, *operands(x, y))


@op("Clip")
def clip(
    x: Tensor, low: Value = None, high: Value = None, *, min: float | None = None, max: float | None = None
) -> Tensor:
    """Limit the entries; limits were attributes before opset 11."""
    low = min if low is None else scalar_or_tensor(low, x)
    high = max if high is None else scalar_or_tensor(high, x)
    if low is None and high is None:
        return x
    if isinstance(low, Tensor) != isinstance(high, Tensor):
        low, high = (None if one is None else torch.as_tensor(one, dtype=x.dtype) for one in (low, high))
    return widened(torch.clamp)(x, low, high)


def _unary(name: str, function: Callable[[Tensor], Tensor]) -> None:
    @op(name)
    def call(x: Tensor) -> Tensor:
        return function(x)


def _sign(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, torch.sign(x)) if x.is_floating_point() else torch.sign(x)


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": lambda x: x if x.dtype in WIDE else torch.abs(x),
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": widened(torch.bitwise_not),
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": _sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": lambda x: F.softplus(x, threshold=30 if x.dtype == torch.float64 else 20),
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "HardSwish": F.hardswish,
}
for _name, _function in UNARY.items():
    _unary(_name, _function)


@op("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Which entries are infinite, of the signs asked for."""
    if detect_negative and detect_positive:
        return torch.isinf(x)
    signs = [sign for sign, asked in ((math.inf, detect_positive), (-math.inf, detect_negative)) if asked]
    return (
        functools.reduce(torch.logical_or, [x == sign for sign in signs])
        if signs
        else torch.zeros_like(x, dtype=torch.bool)
    )


@op("Identity")
def identity(x: Value) -> Value:
    """The input itself."""
    return x


@op("Dropout")
def dropout(
    x: Tensor,
    ratio: Number = 0.5,
    training_mode: Number = False,
    *,
    seed: int = 0,
    is_test: int = 1,
    outputs: int = 1,
) -> Any:
    """The input itself, and a mask of ones: files are run for inference.  Opset 11 has attributes."""
    if training_mode and ratio != 0:
        raise Unsupported("it is in training mode, so its result is random")
    return (x, torch.ones_like(x, dtype=torch.bool)) if outputs == 2 else x


@op("Cast")
def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """The entries in another type; floats to integers are cut."""
    if to not in DTYPES:
        raise Unsupported(f"type number {to} has no form in torch")
    return cast_to(x, DTYPES[to], bool(saturate))


@op("CastLike", since=15)
def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """The entries in the type of another tensor."""
    return cast_to(x, like.dtype, bool(saturate))


FLOAT8 = {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}


def cast_to(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    """Cast; to float8 types values beyond the range become the largest (saturate), or infinite where there is one."""
    if dtype not in FLOAT8 or x.dtype in FLOAT8:
        return x.to(dtype)
    wide = x.float()
    largest = torch.finfo(dtype).max
    if saturate:
        return torch.where(wide.isnan(), wide, wide.clamp(-largest, largest)).to(dtype)
    if dtype == torch.float8_e4m3fn:  # no infinity; 464 is half-way to what would come after the largest
        wide = torch.where(wide.abs() > 464, math.nan, wide)
    return wide.to(dtype)
