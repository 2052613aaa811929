"""What shapes a node's results have, found by running it: at several sizes, and at each on different data.

A size of a result is a constant, follows from the sizes of one input (see `Size`), or depends on data.  The last is
what remains when nothing simpler fits all runs, or when runs at the same sizes differ.  `tamis::onnx_node` holds every
call against what was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...kernels.onnx_node import why
from ...opaque import Result, Size
from .known import Array
from .table import Unsupported

LADDERS = ((6, 9, 16, 4, 25, 12, 32, 8), (64, 100, 128, 81, 96, 72, 144, 112))  # sizes tried; more where these fail
APART = 3  # places of the ladder between two symbols, so that they do not change together
DRAWS = 3  # kinds of data: mixed, nothing but zeros, half zeros
FACTORS = range(1, 17)
LARGEST = 2**24  # entries of an input of a trial
Run = Callable[[list[Array]], list[Any]]


@dataclass(frozen=True)
class Given:
    """An input as trials see it.

    shape    integers or sympy's expressions
    numbers  its entries, where they follow from sizes
    hints    the example's sizes
    """

    dtype: np.dtype[Any]
    shape: tuple[Any, ...]
    numbers: tuple[Any, ...] | None = None
    hints: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Trial:
    """One successful run: the shapes of the inputs and of the results."""

    inputs: tuple[tuple[int, ...], ...]
    results: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


def results_of(run: Run, inputs: list[Given]) -> tuple[Result, ...]:
    """The results of a node.

    Args:
        run: evaluates the node on arrays; raises RuntimeError or ValueError where it cannot.
        inputs: what is known of them.

    Raises:
        Unsupported: it fails at all sizes, draws random numbers, or answers with lists, text, or another number of axes
            from time to time.
    """
    symbols = sorted({s for one in inputs for x in (*one.shape, *(one.numbers or ())) for s in _symbols(x)}, key=str)
    trials = _trials(run, inputs, symbols)
    if len({(one.dtypes, tuple(map(len, one.results))) for one in trials}) > 1:
        raise Unsupported("the types or the numbers of axes of its results depend on data")
    unknown: dict[tuple[int, ...], str] = {}

    def size(place: int, axis: int) -> int | Size | str:
        values = tuple(one.results[place][axis] for one in trials)
        found = _explained(values, trials, bool(symbols))
        return unknown.setdefault(values, f"u{len(unknown)}") if found is None else found

    first = trials[0]
    return tuple(
        Result(dtype, tuple(size(place, axis) for axis in range(len(shape))))
        for place, (dtype, shape) in enumerate(zip(first.dtypes, first.results, strict=True))
    )


def checked(results: list[Any]) -> list[Array]:
    """The results as arrays of numbers; raises Unsupported."""
    for one in results:
        if not isinstance(one, np.ndarray) or one.dtype.kind not in "biuf" or not hasattr(torch, str(one.dtype)):
            raise Unsupported("it answers with a list, with text, or with a type that torch does not have")
    return results


def steady(run: Run, arrays: list[Array]) -> list[Array]:
    """The results, which must be the same the second time; raises Unsupported."""
    results = checked(run(arrays))
    for one, again in zip(results, run(arrays), strict=True):
        if not np.array_equal(one, again, equal_nan=one.dtype.kind == "f"):
            raise Unsupported("it draws random numbers")
    return results


def _trials(run: Run, inputs: list[Given], symbols: list[Any]) -> list[Trial]:
    """Runs at all sizes that the node takes."""
    found: list[Trial] = []
    failure: Exception | None = None
    for ladder in LADDERS:
        for values in _assignments(inputs, symbols, ladder):
            shapes = tuple(tuple(_number(size, values) for size in one.shape) for one in inputs)
            if any(min(one, default=1) < 0 or math.prod(one) > LARGEST for one in shapes) and found:
                continue
            for draw in range(DRAWS):
                arrays = [_array(*pair, values, draw) for pair in zip(inputs, shapes, strict=True)]
                try:
                    results = run(arrays) if found else steady(run, arrays)
                except (RuntimeError, ValueError) as error:
                    failure = failure or error
                    continue
                outs = checked(results)
                found.append(Trial(shapes, tuple(one.shape for one in outs), tuple(str(one.dtype) for one in outs)))
        if len({one.inputs for one in found}) >= min(APART, 8 ** len(symbols)):
            return found
    if not found:
        raise Unsupported(f"ONNX Runtime says: {why(failure or ValueError())}")
    return found


def _assignments(inputs: list[Given], symbols: list[Any], ladder: tuple[int, ...]) -> Iterator[dict[Any, int]]:
    """Values for the symbols: those of the example and multiples of them, then sizes of the ladder."""
    if not symbols:
        yield {}
        return
    pairs = [(size, hint) for one in inputs for size, hint in zip(one.shape, one.hints, strict=False)]
    hints = {size: hint for size, hint in pairs if size in symbols and isinstance(hint, int)}
    if set(symbols) <= hints.keys() and ladder is LADDERS[0]:
        yield from ({symbol: hint * times for symbol, hint in hints.items()} for times in (1, 2, 3))
    for step in range(len(ladder)):
        yield {symbol: ladder[(step + APART * i) % len(ladder)] for i, symbol in enumerate(symbols)}


def _symbols(value: Any) -> set[Any]:
    return getattr(value, "free_symbols", set())


def _number(value: Any, values: dict[Any, int]) -> int:
    return int(value.subs(values)) if _symbols(value) else int(value)


def _array(given: Given, shape: tuple[int, ...], values: dict[Any, int], draw: int) -> Array:
    """Data of one kind; integers are zeros and ones, which are places of any table."""
    if given.numbers is not None:
        return np.array([_number(one, values) for one in given.numbers], given.dtype).reshape(shape)
    generator = np.random.default_rng(draw)
    if draw == 1:
        return np.zeros(shape, given.dtype)
    if given.dtype.kind != "f":
        return np.asarray(generator.integers(2, size=shape) if draw else np.ones(shape)).astype(given.dtype)
    data = generator.standard_normal(shape)
    return np.asarray(np.where(generator.random(shape) < 0.5, 0, data) if draw else data).astype(given.dtype)


def _explained(values: tuple[int, ...], trials: list[Trial], symbolic: bool) -> int | Size | None:
    """What all values are, in terms of the inputs' sizes; None: nothing simple."""
    kinds = len({one.inputs for one in trials})
    if len(set(values)) == 1:
        return values[0] if kinds > 1 or not symbolic else None
    by_inputs: dict[Any, set[int]] = {}
    for one, value in zip(trials, values, strict=True):
        by_inputs.setdefault(one.inputs, set()).add(value)
    if any(len(one) > 1 for one in by_inputs.values()):
        return None
    sources = list(_sources(trials))
    for place, first, end, sizes in sources:
        if sizes == values:
            return Size(place, first, end)
    fitted = (_fitted(values, *source) for source in sources)
    return next((one for one in fitted if one is not None), None)


def _sources(trials: list[Trial]) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """Sizes of the inputs that change over the trials, single ones first, then products of neighbouring ones."""
    for length in (1, 2, 3):
        for place, shape in enumerate(trials[0].inputs):
            for first in range(len(shape) - length + 1):
                sizes = tuple(math.prod(one.inputs[place][first : first + length]) for one in trials)
                if len(set(sizes)) > 1:
                    yield place, first, first + length, sizes


def _fitted(values: tuple[int, ...], place: int, first: int, end: int, sizes: tuple[int, ...]) -> Size | None:
    """(times * size + plus) // over with small factors, if enough different sizes were tried to tell."""
    distinct = len(set(sizes))
    for over in FACTORS:
        for times in FACTORS:
            if math.gcd(times, over) > 1 or distinct < (3 if over == 1 else 5):
                continue
            least = max(over * value - times * size for value, size in zip(values, sizes, strict=True))
            most = min(over * value - times * size + over - 1 for value, size in zip(values, sizes, strict=True))
            if least == most:
                return Size(place, first, end, times, least, over)
    return None
