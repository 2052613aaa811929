"""Cluttered scenes: one handwritten digit at a random place and size, among things that are not a whole digit.

The digits are scikit-learn's (8 x 8, 1797 of them); the label of a scene is the digit that is there whole.  Around it
lie fragments of other digits, strokes, blobs of noise, and a noisy ground, so that most of the canvas does not matter.
The source images are split once: no digit image that a training scene shows, whole or in part, is in a held-out scene.

A scene depends on its split, seed and index alone.  The arithmetic is that of IEEE (no sine, no exponential), rounded
to bytes at the end, so the same scene has the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

CANVAS = 64
SIZES = (16, 25)  # pixels of a digit's side, both ends included
HELD_OUT = 450  # source images kept from training
FRAGMENTS, STROKES, BLOBS = (4, 9), (2, 6), (2, 5)  # how many of each, both ends included
DIMMED = 0.2  # clutter inside the digit's box

Array = np.ndarray


@dataclass(frozen=True)
class Scene:
    """One example: `image` [64, 64] uint8, `label` 0 to 9, `box` (top, left, side) of the digit in pixels."""

    image: Array
    label: int
    box: tuple[int, int, int]


@cache
def sources(split: str) -> tuple[Array, Array]:
    """Digit images [n, 10, 10] in 0 to 1 with a border of zeros, and their labels, of "train" or "held_out"."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    chosen = {"train": order[HELD_OUT:], "held_out": order[:HELD_OUT]}[split]
    return np.pad(digits.images[chosen] / 16, ((0, 0), (1, 1), (1, 1))), digits.target[chosen]


def scene(split: str, seed: int, index: int) -> Scene:
    """Scene number `index` of the series `seed`."""
    images, labels = sources(split)
    rng = np.random.default_rng([len(split), seed, index])  # 5 or 8: the two splits share no scene
    clutter = np.zeros((CANVAS, CANVAS))
    for _ in range(rng.integers(*BLOBS, endpoint=True)):
        _blob(clutter, rng)
    for _ in range(rng.integers(*STROKES, endpoint=True)):
        _stroke(clutter, rng)
    for _ in range(rng.integers(*FRAGMENTS, endpoint=True)):
        _fragment(clutter, images[rng.integers(len(images))], rng)
    which = rng.integers(len(images))
    digit = _sprite(images[which], rng)
    side = len(digit)
    top, left = rng.integers(0, CANVAS - side, 2, endpoint=True)
    clutter[top : top + side, left : left + side] *= DIMMED
    _draw(clutter, digit, top, left)
    ground = rng.random((CANVAS, CANVAS)) * rng.uniform(0.05, 0.2)
    image = np.rint(np.maximum(clutter, ground) * 255).astype(np.uint8)
    return Scene(image, int(labels[which]), (int(top), int(left), side))


def scenes(split: str, seed: int, indices: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch for the model: images [B, 1, 64, 64] float32, labels [B] int64."""
    made = [scene(split, seed, index) for index in indices]
    return as_input(np.stack([one.image for one in made])), torch.tensor([one.label for one in made])


def as_input(images: Array) -> torch.Tensor:
    """uint8 [B, h, w] -> float32 [B, 1, h, w]; the dark ground comes out near zero."""
    return torch.from_numpy(images).unsqueeze(1).float() / 64 - 0.5


def _sprite(image: Array, rng: np.random.Generator) -> Array:
    """A digit at a random size, slant, width and contrast: [10, 10] -> [side, side], bilinear."""
    side = int(rng.integers(*SIZES, endpoint=True))
    tilt, shear, stretch = rng.uniform(-0.12, 0.12, 3)
    step = (np.arange(side) - (side - 1) / 2) * (8 / side)
    y, x = step[:, None], step[None, :]
    rows = np.clip((1 + stretch) * y - tilt * x + 4.5, 0, 8.999)
    columns = np.clip((1 - stretch) * x + (tilt + shear) * y + 4.5, 0, 8.999)
    i, j = rows.astype(np.int64), columns.astype(np.int64)
    down, right = rows - i, columns - j
    above = image[i, j] * (1 - right) + image[i, j + 1] * right
    below = image[i + 1, j] * (1 - right) + image[i + 1, j + 1] * right
    return (above * (1 - down) + below * down) * rng.uniform(0.7, 1.0)


def _fragment(canvas: Array, image: Array, rng: np.random.Generator) -> None:
    """A part of a digit, at most half as high and half as wide, anywhere."""
    digit = _sprite(image, rng)
    side = len(digit)
    height, width = rng.integers(side // 4, side // 2, 2, endpoint=True)
    i, j = rng.integers(0, side - height, endpoint=True), rng.integers(0, side - width, endpoint=True)
    top, left = rng.integers(0, CANVAS - height, endpoint=True), rng.integers(0, CANVAS - width, endpoint=True)
    _draw(canvas, digit[i : i + height, j : j + width], top, left)


def _stroke(canvas: Array, rng: np.random.Generator) -> None:
    """A straight line, one to two and a half pixels wide, with soft edges."""
    (y0, x0), (dy, dx) = rng.uniform(0, CANVAS, 2), rng.uniform(-24, 24, 2)
    width, light = rng.uniform(0.5, 1.25), rng.uniform(0.4, 1.0)
    y, x = np.arange(CANVAS)[:, None] - y0, np.arange(CANVAS)[None, :] - x0
    along = np.clip((y * dy + x * dx) / (dy * dy + dx * dx + 1e-9), 0, 1)
    distance = np.sqrt((y - along * dy) ** 2 + (x - along * dx) ** 2)
    np.maximum(canvas, np.clip(width + 0.5 - distance, 0, 1) * light, out=canvas)


def _blob(canvas: Array, rng: np.random.Generator) -> None:
    """A round patch of noise that fades to its rim."""
    radius = rng.integers(3, 9)
    steps = (np.arange(2 * radius + 1) - radius) / radius
    fade = np.clip(1 - steps[:, None] ** 2 - steps[None, :] ** 2, 0, 1)
    noise = rng.random(fade.shape) * fade * rng.uniform(0.5, 1.0)
    top, left = rng.integers(0, CANVAS - len(fade), 2, endpoint=True)
    _draw(canvas, noise, top, left)


def _draw(canvas: Array, part: Array, top: int, left: int) -> None:
    """The brighter of the two, at a place where `part` fits."""
    place = canvas[top : top + part.shape[0], left : left + part.shape[1]]
    np.maximum(place, part, out=place)
