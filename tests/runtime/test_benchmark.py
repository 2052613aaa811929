"""Timing by known delays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tamis.report import Benchmark
from tamis.runtime import benchmark as timing
from tamis.runtime.benchmark import benchmark
from tamis.runtime.compiled import CompiledModel


class Clock:
    """A clock that only work moves: a loaded machine changes nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_ratios_of_known_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = benchmark(lambda: clock.work(0.02), lambda: clock.work(0.005), repeats=3, shapes="x f32[1]", mode="eager")
    assert found.speedup == pytest.approx(4)
    assert (found.original_ms, found.result_ms) == pytest.approx((20, 5))
    assert found.rounds == 3
    assert found.mode == "eager"


def test_slow_first_calls_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(monkeypatch), {"a": 0, "b": 0}

    def slow_at_first(name: str) -> None:
        calls[name] += 1
        clock.work(0.3 if calls[name] in (1, 4) else 0.01)

    found = benchmark(lambda: slow_at_first("a"), lambda: slow_at_first("b"), repeats=3, shapes="x", mode="eager")
    assert found.original_ms == pytest.approx(10)
    assert (found.low, found.high) == pytest.approx((1, 1))


@pytest.mark.parametrize(("speedup", "word"), [(1.5, "1.50x faster"), (0.5, "0.50x SLOWER")])
def test_text(speedup: float, word: str) -> None:
    text = str(Benchmark(speedup, 0.4, 1.6, 3.0, 2.0, 7, "x f32[1]", "cpu x1"))
    assert text == f"{word} (0.40-1.60 over 7 rounds): 3.00 ms -> 2.00 ms at x f32[1], cpu x1, eager"


def test_an_onnx_file_is_timed_beside_the_original_exported_alike(
    compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both sessions are run on the call's own inputs, with torch's threads; nothing is left on the disk."""
    pytest.importorskip("onnxruntime")
    seen = []

    def one_call_each(original: Any, result: Any, **options: Any) -> Benchmark:
        seen.extend([original(), result()])
        return Benchmark(1.0, 1.0, 1.0, 1.0, 1.0, 1, options["shapes"], "cpu x1", options["mode"])

    monkeypatch.setattr(timing, "benchmark", one_call_each)
    monkeypatch.setattr(timing.tempfile, "tempdir", str(tmp_path))
    path = compiled.export(tmp_path / "toy.onnx", check=False)
    found = compiled.benchmark_onnx(path)
    assert (found.mode, found.shapes) == ("ONNX Runtime", "input_ids i64[2, 8], attention_mask i64[2, 8]")
    (before, _), (after, _) = seen
    want = compiled.run_original()["logits"]
    np.testing.assert_allclose(before, want.numpy(), rtol=1e-5)
    np.testing.assert_allclose(after, 1.1 * want.numpy(), rtol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["toy.onnx"]
