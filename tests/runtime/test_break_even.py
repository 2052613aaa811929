"""dense_below: short calls run the original, from a length that was given or measured, and it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import DECODERS, prompt

import tamis
from tamis.errors import BadParameter, OriginalMissing
from tamis.report import Benchmark
from tamis.runtime.break_even import BreakEven
from tamis.runtime.compiled import CompiledModel

PASSES = "a-shape:sink=1,local=4"


@pytest.fixture(scope="module")
def fast() -> CompiledModel:
    model = DECODERS["llama"].model(layers=1)
    return tamis.compile(model, kwargs=prompt(2, 64, "left"), passes=PASSES, verify=False, dense_below=30)


def runs(fast: CompiledModel, tokens: int, passes: Any = None) -> str:
    """Which of the two answers a prompt of so many tokens."""
    inputs = prompt(2, tokens, "left")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        got, dense = fast(**inputs).logits[real], fast.run_original(**inputs).logits[real]
        sparse = fast.graph.program.module()(**inputs).logits[real]
    assert not torch.allclose(dense, sparse, atol=1e-2)
    return "original" if torch.equal(got, dense) else "result" if torch.equal(got, sparse) else "neither"


def clock(monkeypatch: pytest.MonkeyPatch, pays: Any) -> list[int]:
    """A clock by which the result is faster where `pays(tokens)`, and the lengths it was asked for."""
    asked: list[int] = []

    def benchmark(self: Any, *, input_ids: Any, attention_mask: Any, repeats: int) -> Benchmark:
        asked.append(input_ids.shape[1])
        return Benchmark(2.0 if pays(asked[-1]) else 0.5, 1, 1, 1, 1, repeats, "", "cpu")

    monkeypatch.setattr(CompiledModel, "benchmark", benchmark)
    return asked


def test_calls_of_fewer_tokens_run_the_original(fast: CompiledModel, tmp_path: Path) -> None:
    assert [runs(fast, tokens) for tokens in (29, 30, 50)] == ["original", "result", "result"]
    assert str(fast.guard) == "the original runs below 30 tokens"
    assert fast.recipe.options == {"dense_below": 30}
    said = "calls of fewer than 30 tokens run the original (as was asked for); a file holds the result alone"
    assert said in fast.report.notes
    fast.save(tmp_path / "fast.pt2")
    loaded = tamis.load(tmp_path / "fast.pt2")
    assert loaded.guard is None
    assert runs(loaded.with_original(fast.original), 29) == "original"
    with pytest.raises(OriginalMissing):
        tamis.find_break_even(tamis.load(tmp_path / "fast.pt2"))


@pytest.mark.parametrize(
    ("pays", "tokens", "said"),
    [
        (
            lambda n: n >= 40,
            64,
            "calls of fewer than 64 tokens run the original (measured on cpu, eager: 16 tokens 0.50x",
        ),
        (lambda n: n > 16, 32, "calls of fewer than 32 tokens run the original"),
        (lambda n: n in (16, 64), 64, "calls of fewer than 64 tokens run the original"),
        (lambda n: False, 65, "calls of fewer than 65 tokens run the original"),
        (lambda n: True, 0, "the result was faster at every length (measured on cpu, eager: 16 tokens 2.00x"),
    ],
)
def test_the_length_is_measured(
    fast: CompiledModel, pays: Any, tokens: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = clock(monkeypatch, pays)
    found = tamis.find_break_even(fast)
    assert asked == [16, 32, 64]
    assert found.tokens == tokens
    assert str(found).startswith(said)
    assert [note for note in fast.report.notes if "tokens" in note] == [str(found)]
    assert fast.recipe.options == ({"dense_below": tokens} if tokens else {})
    if tokens == 32:
        assert [runs(fast, n) for n in (31, 32)] == ["original", "result"]
    if not tokens:
        assert fast.guard is None
        assert runs(fast, 5 + 1) == "result"


def test_it_times_for_itself(fast: CompiledModel) -> None:
    found = tamis.find_break_even(fast, **prompt(1, 20, None), lengths=[9, 24], repeats=1)
    assert isinstance(found, BreakEven)
    assert list(found.measured) == [9, 24]
    assert "[1, 24]" in found.measured[24].shapes


def test_what_cannot_be_is_said(fast: CompiledModel) -> None:
    for lengths in ([0], [], [1.5], "ab", 5):
        with pytest.raises(BadParameter, match="lengths must be a list of numbers of tokens, got"):
            tamis.find_break_even(fast, lengths=lengths)
    with pytest.raises(BadParameter, match="repeats must be 1 or more, got 0"):
        tamis.find_break_even(fast, repeats=0)
    model, inputs = DECODERS["llama"].model(layers=1), prompt(2, 20, None)
    for plain, said in ((model, "a LlamaForCausalLM"), (None, "None"), ("vit.pt2", "'vit.pt2'")):
        with pytest.raises(BadParameter, match=f"must be what tamis.compile returned, got {said}.\n  hint: find_"):
            tamis.find_break_even(plain)  # type: ignore[arg-type]
    for wrong in (-1, 2.5, True):
        with pytest.raises(BadParameter, match="dense_below must be a number of tokens"):
            tamis.compile(model, kwargs=inputs, passes=PASSES, dense_below=wrong)  # type: ignore[arg-type]
    with pytest.raises(BadParameter, match="dense_below must be used where"):
        tamis.compile(model, kwargs=inputs, passes=PASSES, dense_below=8, restore=False)
