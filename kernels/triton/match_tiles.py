"""What one program of a matching does: partners for a tile of tokens, and the plan of a row from them."""

from __future__ import annotations

import triton
import triton.language as tl

from .selection import fill_spare, keep_protected, position_of, ranks_of


@triton.jit
def rows_of(metric, position, inside, metric_token, column, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of the metric, zeros outside."""
    at = metric + position.to(tl.int64)[:, None] * metric_token + column[None, :]
    if WIDTH % BLOCK_D == 0:
        return tl.load(at, mask=inside[:, None], other=0)
    return tl.load(at, mask=inside[:, None] & (column < WIDTH)[None, :], other=0)


@triton.jit
def inverse_norm(squares):
    """1 / max(norm, 1e-12), 0 where the norm is infinite or NaN."""
    return tl.where(squares < float("inf"), 1 / tl.maximum(tl.sqrt(squares), 1e-12), 0.0)


@triton.jit
def cosines(
    metric, rows, others, inside, present, metric_token,
    WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_A, BLOCK_B] of the tokens at these places; 0 where one has no usable norm."""
    product = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    squares_a = tl.zeros((BLOCK_A,), tl.float32)
    squares_b = tl.zeros((BLOCK_B,), tl.float32)
    for low in range(0, WIDTH, BLOCK_D):
        column = low + tl.arange(0, BLOCK_D)
        a = rows_of(metric, rows, inside, metric_token, column, WIDTH, BLOCK_D)
        b = rows_of(metric, others, present, metric_token, column, WIDTH, BLOCK_D)
        squares_a += tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
        squares_b += tl.sum(b.to(tl.float32) * b.to(tl.float32), 1)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    scale_a, scale_b = inverse_norm(squares_a)[:, None], inverse_norm(squares_b)[None, :]
    return tl.where((scale_a > 0) & (scale_b > 0), product * scale_a * scale_b, 0.0)


@triton.jit
def find_partners(
    metric, packing, best, partner, start, count, prefix, metric_token,
    WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of a tile of a: the highest similarity with any of b, and with which (the lowest index of equals)."""
    count_a, count_b = halves(count, prefix)
    index = start + tl.arange(0, BLOCK_A)
    inside = index < count_a
    rows = position_of(packing, prefix + prefix % 2 + 2 * index, inside, MASKED)
    top = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    at = tl.zeros((BLOCK_A,), tl.int32)
    for start_b in range(0, count_b, BLOCK_B):
        other = start_b + tl.arange(0, BLOCK_B)
        present = other < count_b
        others = position_of(packing, prefix + 1 - prefix % 2 + 2 * other, present, MASKED)
        similarity = cosines(
            metric, rows, others, inside, present, metric_token, WIDTH, BLOCK_A, BLOCK_B, BLOCK_D, PRECISION
        )
        similarity = tl.where(present[None, :], similarity, float("-inf"))
        highest, where = tl.max(similarity, 1, return_indices=True, return_indices_tie_break_left=True)
        at = tl.where(highest > top, start_b + where, at)
        top = tl.maximum(top, highest)
    tl.store(best + index, top, mask=inside)
    tl.store(partner + index, at, mask=inside)


@triton.jit
def halves(count, prefix):
    """Unprotected tokens of even rank, and of odd rank, among `count` real ones."""
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    return (tl.maximum(count - even, 0) + 1) // 2, (tl.maximum(count - odd, 0) + 1) // 2


@triton.jit
def write_plan(
    best, partner, rank, packing, slot, leader, moved, count, out, extra, prefix, removed,
    TILE: tl.constexpr, RANKED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """slot, leader and moved from each even token's best similarity and partner."""
    count_a, count_b = halves(count, prefix)
    first_b = prefix + count_a - removed  # slot of the first of b
    gone = 0
    for start in range(0, count_a, TILE):
        index = start + tl.arange(0, TILE)
        inside = index < count_a
        if RANKED:
            place = tl.load(rank + index, mask=inside, other=0)
        else:
            place = ranks_of(best, index, inside, count_a, 1, TILE)
        position = position_of(packing, prefix + prefix % 2 + 2 * index, inside, MASKED)
        merges = inside & (place < removed)
        earlier = gone + tl.cumsum(merges.to(tl.int32), 0) - merges.to(tl.int32)
        stay = tl.where(prefix > 0, prefix + index - earlier, place - removed)
        goal = tl.where(merges, first_b + tl.load(partner + index, mask=inside, other=0), stay)
        tl.store(slot + position, goal, mask=inside)
        tl.store(leader + goal, position, mask=inside & (place >= removed))
        tl.store(moved + earlier, position, mask=merges)
        gone += tl.sum(merges.to(tl.int32), 0)
    for start in range(0, count_b, TILE):
        index = start + tl.arange(0, TILE)
        inside = index < count_b
        position = position_of(packing, prefix + 1 - prefix % 2 + 2 * index, inside, MASKED)
        tl.store(slot + position, first_b + index, mask=inside)
        tl.store(leader + first_b + index, position, mask=inside)
    protected = tl.minimum(count, prefix)
    keep_protected(packing, slot, leader, protected, TILE, MASKED)
    if MASKED:
        fill_spare(leader, protected + count_a - removed + count_b, out, moved, removed, extra, TILE)


@triton.jit
def match_row(
    metric, packing, best, partner, slot, leader, moved, count, out, extra, prefix, removed, metric_token,
    WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The plan of one row by one program."""
    count_a, _ = halves(count, prefix)
    for start in range(0, count_a, BLOCK_A):
        find_partners(
            metric, packing, best, partner, start, count, prefix, metric_token,
            WIDTH, BLOCK_A, BLOCK_B, BLOCK_D, PRECISION, MASKED,
        )  # fmt: skip
    tl.debug_barrier()
    write_plan(
        best, partner, best, packing, slot, leader, moved, count, out, extra, prefix, removed, TILE, False, MASKED
    )
