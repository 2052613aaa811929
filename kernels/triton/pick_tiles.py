"""The kernel of `pick_tiles`: one launch, one program per row, no sort.

Scores become whole numbers in the same order.  The smallest number that is read is then found bit by bit from the top,
32 times counting (or adding up) those at or above a candidate; of equals at that border the first ones are read.  A
row's scores stay in the cache of its program.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pick_tiles import capacity
from .architecture import Architecture
from .launch import Launch, Twin, Work

COUNTS = ["tiles", "capacity", "slope", "offset", "divisor"]
COUNTS += ["scores_batch", "scores_set", "scores_row", "scores_tile", "lengths_batch"]


@triton.jit
def placed(score, column, inside, row, SINK: tl.constexpr, DIAGONAL: tl.constexpr):
    """Of scores of a row: place in the order as uint32, share of the mass, whether read at all, whether always read."""
    score = score.to(tl.float32)
    forced = tl.zeros_like(inside)
    if SINK:
        forced = forced | (inside & (column == 0))
    if DIAGONAL:
        forced = forced | (inside & (column == row))
    allowed = forced | (inside & (score != float("-inf")))
    # 0.0 makes one zero of two; NaN is the lowest
    score = tl.where(score == score, tl.minimum(tl.maximum(score, -3.0e38), 3.4028234663852886e38), -3.0e38) + 0.0
    bits = score.to(tl.int32, bitcast=True)
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = rising.to(tl.uint32, bitcast=True) ^ tl.full([1], 0x80000000, tl.uint32)
    order = tl.where(forced, tl.full([1], 0xFFFFFFFF, tl.uint32), order)
    return order, tl.where(allowed, tl.maximum(score, 0.0), 0.0), allowed, forced


@triton.jit
def above(
    scores, low, count, row, stride,
    SINK: tl.constexpr, DIAGONAL: tl.constexpr, WEIGHED: tl.constexpr, STRICT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How many tiles (or how much mass) stand at `low` or above; above it where STRICT."""
    total = 0.0 if WEIGHED else 0
    for start in range(0, count, TILE):
        column = start + tl.arange(0, TILE)
        score = tl.load(scores + column * stride, mask=column < count, other=0)
        order, weight, allowed, _ = placed(score, column, column < count, row, SINK, DIAGONAL)
        there = allowed & ((order > low) if STRICT else (order >= low))
        total += tl.sum(tl.where(there, weight, 0.0) if WEIGHED else there.to(tl.int32), 0)
    return total


@triton.jit
def border(
    scores, target, count, row, stride,
    SINK: tl.constexpr, DIAGONAL: tl.constexpr, WEIGHED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The highest place at or above which there are `target` tiles, or as much mass."""
    low = tl.full([1], 0, tl.uint32)
    for bit in range(32):
        raised = low | (tl.full([1], 0x80000000, tl.uint32) >> bit)
        found = above(scores, raised, count, row, stride, SINK, DIAGONAL, WEIGHED, False, TILE)
        low = tl.where(found >= target, raised, low)
    return low


@triton.jit
def fill_unused(picked, used, capacity, TILE: tl.constexpr):
    """-1 behind the `used` entries of a row."""
    for start in range(used, capacity, TILE):
        place = start + tl.arange(0, TILE)
        tl.store(picked + place, tl.full([TILE], -1, tl.int32), mask=place < capacity)


@triton.jit(do_not_specialize=COUNTS)
def pick_tiles_kernel(
    scores, lengths, picked, borders, sums, tiles, capacity, slope, offset, divisor, mass,
    scores_batch, scores_set, scores_row, scores_tile, lengths_batch,
    BLOCK: tl.constexpr, CAUSAL: tl.constexpr, SINK: tl.constexpr, DIAGONAL: tl.constexpr, WEIGHED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """picked[b, s, r, :]; grid (R, S, B)."""
    row, one, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    scores += batch * scores_batch + one * scores_set + row.to(tl.int64) * scores_row
    own = (batch * tl.num_programs(1) + one) * tl.num_programs(0) + row
    picked, borders, sums = picked + own * capacity, borders + 3 * own, sums + 2 * own
    count = tiles
    if lengths is not None:
        real = tl.load(lengths + batch * lengths_batch).to(tl.int32)
        count = tl.where(row * BLOCK < real, tl.minimum(tiles, (real + BLOCK - 1) // BLOCK), 0)
    if CAUSAL:
        count = tl.minimum(count, row + 1)
    allowed = above(scores, tl.full([1], 0, tl.uint32), count, row, scores_tile, SINK, DIAGONAL, False, False, TILE)
    always = 0
    if SINK:
        always += (count > 0).to(tl.int32)
    if DIAGONAL:
        always += ((count > row) & ((row > 0) | (not SINK))).to(tl.int32)
    most = ((tl.cast(count, tl.int64) * slope + offset) // divisor).to(tl.int32)
    limit = tl.minimum(tl.maximum(most, always), allowed)
    low = border(scores, limit, count, row, scores_tile, SINK, DIAGONAL, False, TILE)
    room = limit - above(scores, low, count, row, scores_tile, SINK, DIAGONAL, False, True, TILE)
    # by way of memory: where an address depends on a function, Inductor takes what that was given for written
    tl.store(borders, tl.sum(low.to(tl.int32, bitcast=True), 0))
    tl.store(borders + 1, room)
    if WEIGHED:
        zero = tl.full([1], 0, tl.uint32)
        target = mass * above(scores, zero, count, row, scores_tile, SINK, DIAGONAL, True, False, TILE)
        low_mass = border(scores, target, count, row, scores_tile, SINK, DIAGONAL, True, TILE)
        before = above(scores, low_mass, count, row, scores_tile, SINK, DIAGONAL, True, True, TILE)
        tl.store(borders + 2, tl.sum(low_mass.to(tl.int32, bitcast=True), 0))
        tl.store(sums, before)
        tl.store(sums + 1, target)
    tl.debug_barrier()
    low, room = tl.load(borders).to(tl.uint32, bitcast=True), tl.load(borders + 1)
    if WEIGHED:
        low_mass = tl.load(borders + 2).to(tl.uint32, bitcast=True)
        before, target = tl.load(sums), tl.load(sums + 1)
    used, ties = 0, 0
    for start in range(0, count, TILE):
        column = start + tl.arange(0, TILE)
        score = tl.load(scores + column * scores_tile, mask=column < count, other=0)
        order, weight, there, forced = placed(score, column, column < count, row, SINK, DIAGONAL)
        tie = (there & (order == low)).to(tl.int32)
        chosen = there & ((order > low) | ((tie > 0) & (ties + tl.cumsum(tie, 0) <= room)))
        ties += tl.sum(tie, 0)
        if WEIGHED:
            share = tl.where(there & (order == low_mass), weight, 0.0)
            earlier = before + tl.cumsum(share, 0) - share
            before += tl.sum(share, 0)
            chosen = chosen & (forced | (order > low_mass) | ((order == low_mass) & (earlier < target)))
        place = used + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(picked + place, column * BLOCK, mask=chosen)
        used += tl.sum(chosen.to(tl.int32), 0)
    fill_unused(picked, used, capacity, TILE)


def work(
    architecture: Architecture,
    scores: Tensor,
    lengths: Tensor | None,
    block: int,
    causal: bool,
    sink: bool,
    diagonal: bool,
    keep: list[int],
    mass: float,
) -> Work:
    """One launch."""
    batch, sets, rows, tiles = scores.shape
    room = capacity(tiles, sink, diagonal, keep)
    picked = scores.new_empty((batch, sets, rows, room), dtype=torch.int32)
    arguments: dict[str, Any] = {
        **{"scores": scores, "lengths": lengths, "picked": picked, "tiles": tiles, "capacity": room, "mass": mass},
        "borders": scores.new_empty((batch, sets, rows, 3), dtype=torch.int32),
        "sums": scores.new_empty((batch, sets, rows, 2), dtype=torch.float32),
        **dict(zip(("slope", "offset", "divisor"), keep, strict=True)),
        **dict(zip(("scores_batch", "scores_set", "scores_row", "scores_tile"), scores.stride(), strict=True)),
        "lengths_batch": 0 if lengths is None else lengths.stride(0),
    }
    constants = {"BLOCK": block, "CAUSAL": causal, "SINK": sink, "DIAGONAL": diagonal, "WEIGHED": mass < 1}
    config = architecture.config("pick_tiles_kernel").having(**constants)
    return [Launch(pick_tiles_kernel, (rows, sets, batch), arguments, config)], picked


def why_not(scores: Tensor, *_: Any) -> str:
    """Float64 is the tests' precision, not a GPU's."""
    return "scores in torch.float64" if scores.dtype == torch.float64 else ""


def examples() -> Iterator[tuple[Any, ...]]:
    """128k tokens in tiles of 128 at 10 % of density, and until 90 % of the mass; a padded batch."""
    for batch, sets, tiles, padded, mass in [
        (1, 8, 1024, False, 1.0),
        (1, 32, 1024, False, 0.9),
        (4, 8, 64, True, 0.9),
    ]:
        scores = torch.empty(batch, sets, tiles, tiles, device="meta")
        lengths = torch.empty(batch, dtype=torch.int64, device="meta") if padded else None
        yield scores, lengths, 128, True, True, True, [1, 9, 10], mass


TWIN = Twin(work, examples, why_not)
