"""The climb to better block sizes, with a clock of ours in place of a GPU."""

from __future__ import annotations

import torch

from tamis.kernels.triton.architecture import Architecture, Config
from tamis.kernels.triton.restore import TWIN
from tamis.kernels.triton.tuning import climb, entries_of, fits, neighbours

SM_90 = Architecture.named("sm_90")
ARGS = (torch.empty(8, 46, 1024, dtype=torch.float16), torch.zeros(8, 197, dtype=torch.int64))


def test_neighbours_are_one_step_away():
    found = list(neighbours(Config({"TILE": 64, "MASKED": True, "SCAN": 8}, warps=1, stages=4)))
    assert [(one.constants["TILE"], one.warps, one.stages) for one in found] == [
        (32, 1, 4),
        (128, 1, 4),
        (64, 2, 4),
        (64, 1, 3),
    ]


def test_an_entry_is_the_one_the_launch_reads():
    assert entries_of(TWIN, SM_90, ARGS) == [("restore_kernel", "*")]


def test_the_climb_finds_the_fastest_and_stops():
    timed = []

    def seconds(launches):
        (one,) = launches
        timed.append((one.config.constants["TILE"], one.config.warps))
        return 1.0 + abs(one.config.constants["TILE"] - 1024) / 1024 + abs(one.config.warps - 2) / 10

    best, after, before = climb(TWIN, SM_90, ARGS, ("restore_kernel", "*"), seconds)
    assert (best.constants["TILE"], best.warps) == (1024, 2)
    assert after == 1.0 < before


def test_what_spills_or_does_not_fit_is_not_timed():
    from tamis.kernels.triton.match import TWIN as match

    (example, *_) = match.examples()
    (launch,) = match.work(SM_90, *example)[0]
    assert fits(launch, SM_90)
    small = Architecture("tiny", "cuda", 90, shared=1024)
    assert not fits(launch, small)
