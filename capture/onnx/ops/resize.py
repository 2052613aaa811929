"""Resizing: every axis by itself, as a choice of entries or as weighted sums of neighbours."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..known import Array
from ..table import Ints, Unsupported, from_start, op

KEPT, LARGEST = "stretch", "not_larger"
CROP = "tf_crop_and_resize"
PLACES: dict[str, Callable[[Array, Any], Any]] = {
    "half_pixel": lambda i, a: (i + 0.5) / a.scale - 0.5,
    "pytorch_half_pixel": lambda i, a: (i + 0.5) / a.scale - 0.5 if a.exact != 1 else i - 0.5,
    "half_pixel_symmetric": lambda i, a: (i + 0.5) / a.scale - 0.5 + a.before / 2 * (1 - a.after / a.exact),
    "align_corners": lambda i, a: i * (a.before - 1) / (a.exact - 1) if a.exact != 1 else i * 0.0,
    "asymmetric": lambda i, a: i / a.scale,
    CROP: lambda i, a: a.start * (a.before - 1) + (a.end - a.start) * (a.before - 1) * a.fraction(i),
}
ROUNDED: dict[str, Callable[[Array], Any]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


@dataclass(frozen=True)
class Axis:
    """One axis that changes: its sizes, the factor between them, and the part of it that is taken (0 to 1)."""

    axis: int
    before: int
    after: int
    scale: float
    start: float = 0.0
    end: float = 1.0

    @property
    def exact(self) -> float:
        """The size after, before it was cut to an integer."""
        return self.scale * self.before

    def fraction(self, i: Array) -> Any:
        """How far along the result its entries are."""
        return i / (self.exact - 1) if self.exact != 1 else i * 0.0 + 0.5


@dataclass(frozen=True)
class Sampling:
    """How entries between places are made; the attributes of Resize."""

    mode: str
    places: str
    nearest: str
    cubic: float
    inside: bool
    smooth: bool

    def places_of(self, one: Axis) -> Array:
        """Where the entries of the result lie in the input; in float32, as runtimes have it, which decides ties."""
        if self.places not in PLACES:
            raise Unsupported(f"its coordinate transformation {self.places!r} is not known")
        return np.asarray(PLACES[self.places](np.arange(one.after, dtype=np.float32), one)).astype(np.float64)

    def weights(self, one: Axis) -> Array:
        """[after, before]: how much of every entry goes into each entry of the result."""
        places = self.places_of(one)
        reach, stretch = (1 if self.mode == "linear" else 2), (min(one.scale, 1.0) if self.smooth else 1.0)
        first = math.floor(-reach / stretch) + 1
        left = np.ceil(places) - 1  # of a place on an entry, that entry is the right neighbour
        taps = left[:, None] + np.arange(first, 2 - first)
        parts = self._kernel(np.abs(taps - places[:, None]) * stretch)
        if self.inside:
            parts = np.where((taps < 0) | (taps >= one.before), 0.0, parts)
        parts = parts / parts.sum(1, keepdims=True)
        weights = np.zeros((one.after, one.before))
        np.add.at(weights, (np.arange(one.after)[:, None], np.clip(taps, 0, one.before - 1).astype(int)), parts)
        return weights

    def _kernel(self, x: Array) -> Array:
        """Weight by distance: a triangle, or Keys' cubic convolution (1981)."""
        if self.mode == "linear":
            return np.clip(1 - x, 0.0, 1.0)
        a = self.cubic
        near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@op("Resize", since=11)
def resize(
    x: Tensor,
    roi: Ints | None = None,
    scales: Ints | None = None,
    sizes: Ints | None = None,
    *,
    antialias: int = 0,
    axes: list[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = KEPT,
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Along some axes, all by default, other sizes: nearest entries, linear or cubic interpolation.

    Axes that change have a fixed size.  Weights are computed in float64, between places in float32, and used in x's
    type.
    """
    sampling = Sampling(
        mode, coordinate_transformation_mode, nearest_mode, cubic_coeff_a, bool(exclude_outside), bool(antialias)
    )
    axes = list(range(x.ndim)) if axes is None else [from_start(axis, x.ndim) for axis in axes]
    spans = list(zip(roi[: len(axes)], roi[len(axes) :], strict=True)) if roi and sampling.places == CROP else None
    y = x
    changed = _axes(x, axes, scales, sizes, spans, keep_aspect_ratio_policy)
    for one in changed:
        y = _along(y, one, sampling)
    if sampling.places == CROP:
        outside = [_outside(sampling.places_of(one), one, x.ndim) for one in changed]
        y = torch.where(functools.reduce(torch.logical_or, outside), extrapolation_value, y)
    return y


def _outside(places: Array, one: Axis, rank: int) -> Tensor:
    """Which entries of an axis lie outside of the input, beside other axes."""
    found = torch.tensor(((places < 0) | (places > one.before - 1)).tolist())
    return found.reshape([-1 if axis == one.axis else 1 for axis in range(rank)])


@op("Resize", since=10)
@op("Upsample", since=9)
def resize_by_scales(x: Tensor, scales: Ints, *, mode: str = "nearest") -> Tensor:
    """As from opset 11 on; entries of the result lie at multiples of 1 / scale."""
    how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return resize(x, None, scales, mode=mode, **how)  # type: ignore[arg-type]


@op("Upsample", since=7)
def upsample_by_attribute(x: Tensor, *, scales: list[float], mode: str = "nearest") -> Tensor:
    """As from opset 9 on, with an attribute."""
    return resize_by_scales(x, scales, mode=mode)


def _axes(x: Tensor, axes: list[int], scales: Ints | None, sizes: Ints | None, spans: Any, policy: str) -> list[Axis]:
    """The axes that change."""
    given: list[Any] = list(scales) if scales else [None] * len(axes)
    wanted: list[Any] = list(sizes) if sizes else [None] * len(axes)
    changing = [
        i for i, axis in enumerate(axes) if spans or not (_same(wanted[i], x.shape[axis]) or _same(given[i], 1.0))
    ]
    if not changing:
        return []
    for i in changing:
        if not isinstance(x.shape[axes[i]], int) or isinstance(wanted[i], torch.SymInt):
            raise Unsupported(f"it resizes axis {axes[i]}, whose size is not fixed")
    if sizes and policy != KEPT:
        best = min if policy == LARGEST else max
        changing = list(range(len(axes)))
        given = [best(wanted[i] / x.shape[axes[i]] for i in changing)] * len(axes)
        wanted = [math.floor(given[i] * x.shape[axes[i]] + 0.5) for i in changing]
    return [_axis(axes[i], x.shape[axes[i]], given[i], wanted[i], spans[i] if spans else (0.0, 1.0)) for i in changing]


def _axis(axis: int, before: int, scale: Any, after: Any, span: tuple[float, float]) -> Axis:
    scale = after / before if scale is None else scale
    return Axis(axis, before, math.floor(before * scale) if after is None else after, scale, *span)


def _same(a: Any, b: Any) -> bool:
    return a is not None and bool(a == b)


def _along(x: Tensor, one: Axis, sampling: Sampling) -> Tensor:
    if sampling.mode == "nearest":
        if sampling.nearest not in ROUNDED:
            raise Unsupported(f"its rounding {sampling.nearest!r} is not known")
        near = np.clip(ROUNDED[sampling.nearest](sampling.places_of(one)), 0, one.before - 1)
        return x.index_select(one.axis, torch.tensor(near.astype(int).tolist()))
    if sampling.mode not in ("linear", "cubic"):
        raise Unsupported(f"its mode {sampling.mode!r} is not known")
    weights = torch.tensor(sampling.weights(one).tolist(), dtype=x.dtype)
    return (x.movedim(one.axis, -1) @ weights.T).movedim(-1, one.axis)
