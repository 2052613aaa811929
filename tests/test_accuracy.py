"""Real accuracy: the trained digits ViT, dense and reduced, on held-out scenes; and the page that reports it."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import accuracy
import numpy as np
import pytest
import torch
from accuracy_page import rendered
from digits.model import WEIGHTS
from digits.task import Digits
from reductions import FLOPS, KEEP_RATIOS, compiled, control_of, methods

from tamis.passes import EViT, ToMe
from tamis.runtime.api import Prepared, prepare

SCENES = 200
FOUND = json.loads(accuracy.RESULT.read_text())
MILD = {"tome": ToMe(keep_ratio=0.9), "evit": EViT(keep_ratio=0.7)}
STRONG = {"tome": ToMe(keep_ratio=0.7), "evit": EViT(keep_ratio=0.5)}  # where losses are large enough to compare


@cache
def task() -> Digits:
    return Digits(SCENES)


@cache
def captured() -> Prepared:
    return prepare(task().model, (task().example(),))


@cache
def right(name: str) -> np.ndarray:
    """1 for each scene that the dense model ("") or a mild reduction answers rightly."""
    model = compiled(captured(), MILD[name]) if name else task().model
    return task().score(model)["accuracy"]


def test_the_dense_model_is_as_good_as_the_page_says() -> None:
    claimed = FOUND["digits"]["dense"]["accuracy"]["mean"]
    assert claimed > 0.95
    assert right("").mean() > claimed - 0.03


@pytest.mark.parametrize("name", MILD)
def test_a_mild_reduction_keeps_accuracy(name: str) -> None:
    assert right(name).mean() > right("").mean() - 0.05


@pytest.mark.parametrize("name", STRONG)
def test_a_method_beats_random_drop_at_equal_counts(name: str) -> None:
    """By more than three standard errors of the paired difference."""
    method = STRONG[name]
    models = [compiled(captured(), one) for one in (method, control_of(method, seed=0))]
    counts = [[layer.tokens_out for layer in model.report.layers] for model in models]
    assert counts[0] == counts[1]
    own, control = (task().score(model)["accuracy"] for model in models)
    gain = own - control
    assert gain.mean() > 3 * gain.std(ddof=1) / len(gain) ** 0.5


def test_onnx_predicts_the_same_classes(tmp_path: Path) -> None:
    import onnxruntime

    model = compiled(captured(), MILD["tome"])
    model.export(tmp_path / "digits.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "digits.onnx", providers=["CPUExecutionProvider"])
    images = task().data(0)[0][:60]
    logits: Any = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.inference_mode():
        expected = model(images)
    assert len(set(expected.argmax(1).tolist())) > 5
    np.testing.assert_array_equal(logits.argmax(1), expected.argmax(1).numpy())


def test_the_page_says_what_was_measured() -> None:
    page = accuracy.PAGE.read_text()
    assert rendered(page, FOUND) == page
    assert rendered(page.replace("generated -->\n", "generated -->\nold\n"), FOUND) == page
    assert FOUND["digits"]["weights"] == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["digits", "retrieval"])
def test_every_method_and_level_is_in_the_results(name: str) -> None:
    rows = FOUND[name]["rows"]
    assert {row["method"] for row in rows} == {cls.name for cls in methods()}
    for cls in methods():
        found = [row for row in rows if row["method"] == cls.name]
        levels = len(FLOPS) + (0 if cls.own_count is True else len(KEEP_RATIOS))
        assert len(found) == (1 if "refused" in found[0] else levels)


def test_verdicts() -> None:
    def row(mean: float) -> dict[str, Any]:
        return {"difference": {"mean": mean, "error": 0.01}}

    said = [accuracy.verdict(row(mean)) for mean in (0.03, 0.01, -0.03)]
    assert said == ["better", "not told apart", "**loses to the control**"]
    assert accuracy.verdict({}) == "is the control"


def test_differences_are_paired() -> None:
    own = [{"m": np.array([1.0, 0.0])}, {"m": np.array([1.0, 1.0])}]
    control = [{"m": np.array([0.0, 0.0])}, {"m": np.array([0.0, 0.0])}]
    assert accuracy.difference(own, control, "m") == {"mean": 0.75, "error": 0.25}  # items 1 0 1 1
    shared = accuracy.difference(own[:1], control, "m")
    assert shared == {"mean": 0.5, "error": 0.5}  # items 1 0, whatever the number of draws


def test_new_rows_take_the_place_of_old_ones() -> None:
    old = {"scenes": 3, "rows": [{"method": "a", "x": 1}, {"method": "b", "x": 1}], "runs": {"a": 1, "b": 1}}
    found = accuracy.merged(old, {"scenes": 3, "rows": [{"method": "b", "x": 2}]}, {"commit": "c"})
    assert found["rows"] == [{"method": "a", "x": 1}, {"method": "b", "x": 2}]
    assert found["runs"] == {"a": 1, "b": {"commit": "c"}}
    other = accuracy.merged(old, {"scenes": 4, "rows": [{"method": "b", "x": 2}]}, {"commit": "c"})
    assert other == {"scenes": 4, "rows": [{"method": "b", "x": 2}], "runs": {"b": {"commit": "c"}}}
    assert accuracy.merged({}, {"rows": [{"method": "a"}]}, {})["runs"] == {"a": {}}
