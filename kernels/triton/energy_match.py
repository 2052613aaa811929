"""The kernel of `energy_match`: one launch, one program per row, similarities that never leave the chip.

    energy of every token, tile by tile;  its rank, by counting, and so the order
    partners of every other token of that order among those between, as `match` finds them
    slot, leader and moved

The product of the similarities is made twice, for energies and for partners, and nothing of size N x N is written.
Rows of any length take one program, which is slow beyond some 1024 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...counts import HALF, CountRule, at_most
from .architecture import Architecture
from .launch import Launch, Twin, Work
from .match import blocks, empty_plan, row_arguments
from .match import why_not as why_not_match
from .match_tiles import cosines, find_partners, halves
from .selection import (
    COUNTS,
    fill_spare,
    keep_protected,
    pack_row,
    position_of,
    ranks_of,
    removed_of,
    row_scratch,
)


@triton.jit
def find_energies(
    metric, packing, energy, start, count, prefix, metric_token, margin, alpha,
    WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, PAPER: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of a tile of the `count` unprotected tokens: the mean of how similar all are to each."""
    index = start + tl.arange(0, BLOCK_A)
    inside = index < count
    rows = position_of(packing, prefix + index, inside, MASKED)
    total = tl.zeros((BLOCK_A,), tl.float32)
    for start_b in range(0, count, BLOCK_B):
        other = start_b + tl.arange(0, BLOCK_B)
        present = other < count
        others = position_of(packing, prefix + other, present, MASKED)
        similarity = cosines(
            metric, rows, others, inside, present, metric_token, WIDTH, BLOCK_A, BLOCK_B, BLOCK_D, PRECISION
        )
        # exactly 1 on the diagonal, as the reference has it
        similarity = tl.where(index[:, None] == other[None, :], 1.0, similarity)
        above = similarity - margin
        below = alpha * (tl.exp(above) - 1)
        each = tl.where(above >= 0, similarity, below) if PAPER else tl.where(above > 0, above, below)
        total += tl.sum(tl.where(present[None, :], each, 0.0), 1)
    tl.store(energy + index, total / count, mask=inside)


@triton.jit
def order_tokens(packing, energy, order, slot, flag, count, tokens, prefix, TILE: tl.constexpr, MASKED: tl.constexpr):
    """order[k]: where the token of the k-th highest energy stands; `flag` becomes 0 everywhere."""
    for start in range(0, tokens, TILE):
        position = start + tl.arange(0, TILE)
        tl.store(flag + position, tl.zeros((TILE,), tl.int32), mask=position < tokens)
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        inside = index < count
        place = ranks_of(energy, index, inside, count, 1, TILE)
        tl.store(order + place, position_of(packing, prefix + index, inside, MASKED), mask=inside)


@triton.jit
def write_slots(
    best, partner, order, slot, leader, flag, count, paired, prefix, removed, TILE: tl.constexpr, HALVES: tl.constexpr
):
    """slot, leader and who merges, of `count` unprotected tokens of which the first `paired` were split."""
    count_a, count_b = halves(paired, 0)
    kept = count - count_b - removed
    for start in range(0, count_a, TILE):
        index = start + tl.arange(0, TILE)
        inside = index < count_a
        place = index
        if HALVES:
            place = ranks_of(best, index, inside, count_a, 1, TILE)
        merges = inside & (place < removed)
        position = tl.load(order + 2 * index, mask=inside, other=0)
        goal = prefix + kept + tl.load(partner + index, mask=inside, other=0)
        goal = tl.where(merges, goal, prefix + place - removed)
        tl.store(slot + position, goal, mask=inside)
        tl.store(leader + goal, position, mask=inside & (place >= removed))
        tl.store(flag + position, tl.full((TILE,), 1, tl.int32), mask=merges)
    for start in range(0, count_b, TILE):
        index = start + tl.arange(0, TILE)
        inside = index < count_b
        position = tl.load(order + 2 * index + 1, mask=inside, other=0)
        tl.store(slot + position, prefix + kept + index, mask=inside)
        tl.store(leader + prefix + kept + index, position, mask=inside)
    for start in range(paired, count, TILE):
        index = start + tl.arange(0, TILE)
        inside = index < count
        position = tl.load(order + index, mask=inside, other=0)
        tl.store(slot + position, prefix + index - paired, mask=inside)
        tl.store(leader + prefix + index - paired, position, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def energy_match_kernel(
    metric, valid, best, partner, packing, energy, order, flag, slot, leader, moved, tokens, out, half,
    prefix, limit, slope_0, offset_0, divisor_0, slope_1, offset_1, divisor_1,
    metric_batch, metric_token, valid_batch, valid_token, margin, alpha,
    WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, PAPER: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Everything; grid (batch)."""
    batch = tl.program_id(0).to(tl.int64)
    metric, best, partner = metric + batch * metric_batch, best + batch * half, partner + batch * half
    energy, order, flag = energy + batch * tokens, order + batch * tokens, flag + batch * tokens
    slot, leader, moved = slot + batch * tokens, leader + batch * out, moved + batch * (tokens - out)
    real = tokens
    if MASKED:
        packing += batch * (tokens + 1)
        pack_row(valid + batch * valid_batch, valid_token, packing, slot, tokens, TILE)
        real = tl.load(packing + tokens)
    removed = removed_of(real, prefix, limit, slope_0, offset_0, divisor_0, slope_1, offset_1, divisor_1)
    count = tl.maximum(real - prefix, 0)
    for start in range(0, count, BLOCK_A):
        find_energies(
            metric, packing, energy, start, count, prefix, metric_token, margin, alpha,
            WIDTH, BLOCK_A, BLOCK_B, BLOCK_D, PRECISION, PAPER, MASKED,
        )  # fmt: skip
    tl.debug_barrier()
    order_tokens(packing, energy, order, slot, flag, count, tokens, prefix, TILE, MASKED)
    tl.debug_barrier()
    paired = 2 * removed
    if HALVES:
        paired = count
    for start in range(0, (paired + 1) // 2, BLOCK_A):
        find_partners(
            metric, order, best, partner, start, paired, 0, metric_token,
            WIDTH, BLOCK_A, BLOCK_B, BLOCK_D, PRECISION, True,
        )  # fmt: skip
    tl.debug_barrier()
    write_slots(best, partner, order, slot, leader, flag, count, paired, prefix, removed, TILE, HALVES)
    protected = tl.minimum(real, prefix)
    keep_protected(packing, slot, leader, protected, TILE, MASKED)
    tl.debug_barrier()
    gone = 0
    for start in range(0, tokens, TILE):
        position = start + tl.arange(0, TILE)
        merges = tl.load(flag + position, mask=position < tokens, other=0)
        tl.store(moved + gone + tl.cumsum(merges, 0) - merges, position, mask=merges > 0)
        gone += tl.sum(merges, 0)
    if MASKED:
        fill_spare(leader, protected + count - removed, out, moved, removed, tokens - out, TILE)


def work(
    architecture: Architecture,
    metric: Tensor,
    valid: Tensor | None,
    out: Any,
    prefix: int,
    rule: list[int],
    margin: float,
    alpha: float,
    paper: bool,
    halves: bool,
) -> Work:
    """One launch.  A metric whose features are not contiguous is copied first."""
    metric = metric if metric.stride(2) == 1 else metric.contiguous()
    results, tokens = empty_plan(metric, out), metric.shape[1]
    arguments = {
        **row_arguments(metric, valid, results, prefix, rule),
        **{"metric": metric, "metric_batch": metric.stride(0), "metric_token": metric.stride(1)},
        **{"margin": margin, "alpha": alpha, "energy": row_scratch(metric, tokens, torch.float32)},
        **{name: row_scratch(metric, tokens, torch.int32) for name in ("order", "flag")},
    }
    config = blocks(architecture, metric, "energy_match_kernel")
    config = config.having(MASKED=valid is not None, PAPER=paper, HALVES=halves)
    return [Launch(energy_match_kernel, (metric.shape[0],), arguments, config)], results


def why_not(metric: Tensor, valid: Tensor | None, out: Any, prefix: int, rule: list[int], *_: Any) -> str:
    """As for `bipartite_match`."""
    return why_not_match(metric, valid, out, prefix, rule)


def examples() -> Iterator[tuple[Any, ...]]:
    """ViT-B; text with padding, split in halves; a wide metric by the paper's equation."""
    for batch, tokens, width, dtype, padded, paper, halved in [
        (256, 197, 64, torch.bfloat16, False, False, False),
        (8, 128, 80, torch.float32, True, False, True),
        (2, 577, 320, torch.float16, False, True, False),
    ]:
        metric = torch.empty(batch, tokens, width, dtype=dtype, device="meta")
        valid = torch.empty(batch, tokens, dtype=torch.bool, device="meta") if padded else None
        rule = CountRule(1, (at_most(13), HALF))
        yield metric, valid, rule.out(tokens), 1, rule.flat(), 0.5, 1.0, paper, halved


TWIN = Twin(work, examples, why_not)
