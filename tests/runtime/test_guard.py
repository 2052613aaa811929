"""never_slower=True: at sizes where the result is slower the original runs, and it is said."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch

import tamis
from tamis.errors import BadParameter
from tamis.report import Benchmark
from tamis.runtime.guard import Guard

TIMED = Benchmark(1.0, 1.0, 1.0, 1.0, 1.0, 1, "", "cpu")


def guard_of(speed) -> tuple[Guard, list[tuple[int, ...]]]:
    """A guard whose clock is `speed(batch, tokens)`, and the sizes it was asked for."""
    asked = []

    def measure(x, *, repeats):
        asked.append(tuple(x.shape))
        return dataclasses.replace(TIMED, speedup=speed(*x.shape), shapes=f"x {list(x.shape)}")

    return Guard(measure), asked


def test_a_size_is_timed_once_and_others_follow_from_it():
    guard, asked = guard_of(lambda batch, tokens: batch * tokens / 100)
    said = [guard.prefers_result(((torch.empty(size),), {})) for size in [(4, 40), (4, 40), (8, 40), (1, 50), (1, 20)]]
    assert said == [True, True, True, False, False]
    assert asked == [(4, 40), (1, 50)]
    assert str(guard) == "never slower: the original runs up to x [1, 50] (0.50x), the result from x [4, 40] on (1.60x)"


def test_a_size_that_barely_pays_speaks_for_itself_alone():
    guard, asked = guard_of(lambda batch, tokens: 1.01)
    for size in [(1, 10), (1, 10), (2, 10), (0, 10)]:
        assert guard.prefers_result(((torch.empty(size),), {}))
    assert asked == [(1, 10), (2, 10)]


def test_sizes_that_follow_from_none_are_timed():
    guard, asked = guard_of(lambda batch, tokens: 2.0 if batch > 2 else 0.5)
    for size in [(4, 40), (3, 80), (2, 20), (2, 30)]:
        guard.prefers_result(((torch.empty(size),), {}))
    assert asked == [(4, 40), (3, 80), (2, 20), (2, 30)]


@pytest.fixture(scope="module")
def vit():
    return timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()


@pytest.mark.parametrize("speedup", [0.5, 2.0])
def test_the_faster_one_runs(vit, speedup, monkeypatch):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    fast = tamis.compile(vit, (images,), passes="tome:r=5", never_slower=True)
    monkeypatch.setattr(fast.guard, "_measure", lambda *_, **__: dataclasses.replace(TIMED, speedup=speedup))
    plain = tamis.compile(vit, (images,), passes="tome:r=5")
    with torch.no_grad():
        expected = vit(images) if speedup < 1 else plain(images)
        other = plain(images) if speedup < 1 else vit(images)
        torch.testing.assert_close(fast(images), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(fast(images), other, atol=1e-3)


def test_it_times_for_itself(vit):
    images = torch.randn(2, 3, 64, 64)
    fast = tamis.compile(vit, (images,), passes="tome:r=1", never_slower=True)
    with torch.no_grad():
        fast(images)
    ((sizes, found),) = fast.guard.measured.items()
    assert sizes == (2, 3, 64, 64)
    assert found.rounds == 5


@pytest.mark.parametrize("other", [{"token_map": True}, {"restore": False}])
def test_what_returns_something_else_is_refused(vit, other):
    with pytest.raises(BadParameter, match="never_slower"):
        tamis.compile(vit, (torch.randn(2, 3, 64, 64),), passes="tome:r=1", never_slower=True, **other)
