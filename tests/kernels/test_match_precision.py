"""Float32 keys are multiplied on tensor cores only in a form that can tell the cosines of similar tokens apart."""

from __future__ import annotations

import json

import numpy as np

from tamis.kernels.triton.architecture import TABLES

MARGIN = 1e-5  # of two cosines, from which on a selection is a decision


def tf32(x: np.ndarray) -> np.ndarray:
    """Rounded to the 11 bits that a TF32 factor has."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64) + 0x1000
    return (bits & 0xFFFFE000).astype(np.uint32).view(np.float32)


def cosine_error(product: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    return float(np.abs((product - a @ b.T) / norms).max())


def test_three_products_are_as_good_as_float32_and_one_is_not():
    random = np.random.default_rng(0)
    objects = random.standard_normal((9, 64))[random.integers(0, 9, 400)]
    keys = (objects + 0.3 * random.standard_normal((400, 64))).astype(np.float32)
    a, b = keys[::2], keys[1::2]
    rest_a, rest_b = tf32(a - tf32(a)), tf32(b - tf32(b))
    three = rest_a @ tf32(b).T + tf32(a) @ rest_b.T + tf32(a) @ tf32(b).T
    plain = cosine_error(a @ b.T, a, b)
    assert cosine_error(three, a, b) <= 2 * plain < MARGIN / 10
    assert cosine_error(tf32(a) @ tf32(b).T, a, b) > 10 * MARGIN


def test_no_table_asks_for_one_product():
    entries = [
        entry["PRECISION"]
        for path in TABLES.glob("*.json")
        for entry in json.loads(path.read_text()).get("match_kernel", {}).values()
    ]
    assert len(entries) >= 5
    assert set(entries) <= {"ieee", "tf32x3"}
