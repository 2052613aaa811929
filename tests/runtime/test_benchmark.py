"""Timing by known delays."""

from __future__ import annotations

import time

import pytest

from tamis.report import Benchmark
from tamis.runtime.benchmark import benchmark


def test_ratios_of_known_delays() -> None:
    found = benchmark(lambda: time.sleep(0.02), lambda: time.sleep(0.005), repeats=3, shapes="x f32[1]")
    assert 2.5 < found.speedup < 4.5  # sleep takes a little longer than asked
    assert 20 <= found.original_ms < 30
    assert found.rounds == 3
    assert found.mode == "eager"


def test_slow_first_calls_do_not_count() -> None:
    calls = {"a": 0, "b": 0}

    def slow_at_first(name: str) -> None:
        calls[name] += 1
        time.sleep(0.3 if calls[name] in (1, 4) else 0.01)

    found = benchmark(lambda: slow_at_first("a"), lambda: slow_at_first("b"), repeats=3, shapes="x")
    assert found.original_ms < 20
    assert found.high < 2
    assert found.low > 0.5


@pytest.mark.parametrize(("speedup", "word"), [(1.5, "1.50x faster"), (0.5, "0.50x SLOWER")])
def test_text(speedup: float, word: str) -> None:
    text = str(Benchmark(speedup, 0.4, 1.6, 3.0, 2.0, 7, "x f32[1]", "cpu x1"))
    assert text == f"{word} (0.40-1.60 over 7 rounds): 3.00 ms -> 2.00 ms at x f32[1], cpu x1, eager"
