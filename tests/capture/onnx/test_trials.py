"""Shapes of results found by trials, of functions whose shapes are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sympy

from tamis.capture.onnx.table import Unsupported
from tamis.capture.onnx.trials import Given, results_of
from tamis.opaque import Size

B, N = sympy.Symbol("b", positive=True, integer=True), sympy.Symbol("n", positive=True, integer=True)
FLOAT = np.dtype(np.float32)
X = Given(FLOAT, (B, N, 4), hints=(2, 16, 4))


def refusing(condition: Callable[[Any], bool], function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(x: Any) -> Any:
        if not condition(x):
            raise ValueError("sizes do not fit")
        return function(x)

    return run


CASES: dict[str, tuple[Callable[..., Any], list[Given], list[Any]]] = {
    "the same": (lambda x: x, [X], [Size(0, 0, 1), Size(0, 1, 2), 4]),
    "turned": (lambda x: x.transpose(1, 0, 2), [X], [Size(0, 1, 2), Size(0, 0, 1), 4]),
    "constant": (lambda x: np.zeros((3, 5)), [X], [3, 5]),
    "number": (lambda x: x.sum(), [X], []),
    "one more": (lambda x: np.pad(x, ((0, 0), (0, 1), (0, 0))), [X], [Size(0, 0, 1), Size(0, 1, 2, plus=1), 4]),
    "twice": (lambda x: x.repeat(2, 1), [X], [Size(0, 0, 1), Size(0, 1, 2, times=2), 4]),
    "half spectrum": (
        lambda x: np.abs(np.fft.rfft(x, axis=1)),
        [X],
        [Size(0, 0, 1), Size(0, 1, 2, plus=2, over=2), 4],
    ),
    "every third": (lambda x: x[:, ::3], [X], [Size(0, 0, 1), Size(0, 1, 2, plus=2, over=3), 4]),
    "flat": (lambda x: x.reshape(-1, 4), [X], [Size(0, 0, 2), 4]),
    "all pairs": (lambda x: np.zeros((x.shape[1],) * 2), [X], [Size(0, 1, 2)] * 2),
    "of two": (lambda x, y: x @ y, [X, Given(FLOAT, (4, 7))], [Size(0, 0, 1), Size(0, 1, 2), 7]),
    "only full blocks": (refusing(lambda x: x.shape[1] % 8 == 0, lambda x: x), [X], [Size(0, 0, 1), Size(0, 1, 2), 4]),
    "only long": (refusing(lambda x: x.shape[1] >= 50, lambda x: x), [X], [Size(0, 0, 1), Size(0, 1, 2), 4]),
    "data": (lambda x: np.unique(x), [X], ["u0"]),
    "no symbols": (lambda x: x[:, :2], [Given(FLOAT, (3, 5))], [3, 2]),
    "data at one size": (lambda x: x[x > 0], [Given(FLOAT, (3, 5))], ["u0"]),
    "sum of sizes": (lambda x: np.zeros(x.shape[0] + x.shape[1]), [X], ["u0"]),
}


@pytest.mark.parametrize("case", CASES)
def test_sizes(case: str) -> None:
    function, inputs, sizes = CASES[case]
    (result,) = results_of(lambda xs: [np.asarray(function(*xs), np.float32)], inputs)
    assert result.dtype == "float32"
    assert list(result.sizes) == sizes


def test_equal_sizes_that_depend_on_data_are_one() -> None:
    def run(xs: list[Any]) -> list[Any]:
        values, counts = np.unique(xs[0], return_counts=True)
        return [values, counts, xs[0][xs[0] > 0.5]]

    values, counts, large = results_of(run, [X])
    assert (values.sizes, counts.sizes, large.sizes) == (("u0",), ("u0",), ("u1",))
    assert counts.dtype == "int64"


def test_numbers_that_follow_from_sizes_do() -> None:
    """A vector of sizes, as exporters compute them, is what the trial's sizes say."""
    sizes = Given(np.dtype(np.int64), (2,), numbers=(N, B * 2))
    (result,) = results_of(lambda xs: [np.zeros(xs[1])], [X, sizes])
    assert result.sizes == (Size(0, 1, 2), Size(0, 0, 1, times=2))


def refused(run: Callable[..., Any]) -> str:
    with pytest.raises(Unsupported) as caught:
        results_of(run, [X])
    return str(caught.value)


def test_what_is_refused() -> None:
    generator = np.random.default_rng(0)
    assert refused(lambda xs: [generator.random(3)]) == "it draws random numbers"
    assert refused(lambda xs: [["a", "list"]]).startswith("it answers with a list")
    assert refused(lambda xs: [np.array(["text"])]).startswith("it answers with a list, with text")
    assert refused(lambda xs: [np.zeros((1,) * int(xs[0].any() + 1))]).startswith("the types or the numbers of axes")

    def fails(xs: list[Any]) -> list[Any]:
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : no such luck.")

    assert refused(fails) == "ONNX Runtime says: no such luck"
