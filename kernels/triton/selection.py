"""What the kernels that make plans share: counting by the rule, ranking, and the entries that no decision touches.

One program makes the plan of one row (an image, a sentence).  It walks the row tile by tile, so the number of tokens is
no constant of the kernel, and passes values on to itself through global memory, with a barrier between writing and
reading.  An order is found by counting: the place of a score is the number of scores before it, which is exact, stable
and needs no sort.

Inductor finds out which tensors a kernel writes by following the addresses of its stores back; it stops at loads, but
not at calls of functions that load.  So what an address depends on is loaded where the address is made, or no input of
the op is handed to a function that returns it: an input taken for written would be copied before every launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...counts import CountRule
from .architecture import Architecture
from .launch import Launch

SPLIT_ABOVE = 1024  # tokens of a row from which on one program is too slow, and ranking gets a launch of its own
_NO_LIMIT = 2**31 - 1
_LINEAR_TERMS = 2
# arguments of kernels that differ between layers: one binary serves them all
COUNTS = ["tokens", "half", "prefix", "out", "extra", "count", "limit"]
COUNTS += ["valid_batch", "slot_batch", "scores_batch", "rank_batch"]
COUNTS += [f"{part}_{i}" for i in range(_LINEAR_TERMS) for part in ("slope", "offset", "divisor")]


def rule_arguments(prefix: int, rule: list[int]) -> dict[str, int]:
    """A count rule as arguments of a kernel: a limit, and two terms (slope * T + offset) // divisor."""
    terms = CountRule.from_flat(prefix, list(rule)).terms
    limit = min([b // c for a, b, c in terms if not a], default=_NO_LIMIT)
    linear = [term for term in terms if term[0]] + [(0, _NO_LIMIT, 1)] * _LINEAR_TERMS
    arguments = {"prefix": prefix, "limit": limit}
    for i, (slope, offset, divisor) in enumerate(linear[:_LINEAR_TERMS]):
        arguments |= {f"slope_{i}": slope, f"offset_{i}": offset, f"divisor_{i}": divisor}
    return arguments


def rule_does_not_fit(rule: list[int]) -> str:
    """Why `rule_arguments` cannot say this rule; "" when it can."""
    linear = sum(slope != 0 for slope in rule[1::3])
    return f"a count rule with {linear} terms that grow with the tokens" if linear > _LINEAR_TERMS else ""


def splits(tokens: Any, valid: Any) -> bool:
    """Whether a row is worth several programs.  Known lengths only, because a compiled graph decides it once."""
    return valid is None and type(tokens) is int and tokens > SPLIT_ABOVE


def row_scratch(like: Tensor, length: Any, dtype: torch.dtype) -> Tensor:
    """[B, length] for what a program passes on to itself."""
    return like.new_empty((like.shape[0], length), dtype=dtype)


@triton.jit
def removed_of(count, prefix, limit, slope_0, offset_0, divisor_0, slope_1, offset_1, divisor_1):
    """CountRule.removed(count).  Truncation differs from flooring only below zero, which the maximum cuts off."""
    free = tl.cast(count, tl.int64) - prefix
    least = tl.minimum((free * slope_0 + offset_0) // divisor_0, (free * slope_1 + offset_1) // divisor_1)
    return tl.maximum(tl.minimum(least, limit), 0).to(tl.int32)


@triton.jit
def pack_row(valid, valid_token, packing, slot, tokens, TILE: tl.constexpr):
    """Positions of the real tokens into `packing`, in order, and behind them all their number; -1 into other slots."""
    count = 0
    for start in range(0, tokens, TILE):
        position = start + tl.arange(0, TILE)
        inside = position < tokens
        real = tl.load(valid + position * valid_token, mask=inside, other=0).to(tl.int32)
        tl.store(packing + count + tl.cumsum(real, 0) - real, position, mask=inside & (real > 0))
        tl.store(slot + position, tl.full((TILE,), -1, tl.int64), mask=inside & (real == 0))
        count += tl.sum(real, 0)
    tl.store(packing + tokens, count)
    tl.debug_barrier()


@triton.jit
def position_of(packing, rank, inside, MASKED: tl.constexpr):
    """Where the real tokens of these ranks stand."""
    position = rank
    if MASKED:
        position = tl.load(packing + rank, mask=inside, other=0)
    return position


@triton.jit
def scores_at(scores, index, inside, stride):
    """Scores, NaN as the lowest."""
    value = tl.load(scores + index * stride, mask=inside, other=0)
    if value.dtype.is_floating():
        value = tl.where(value == value, value, float("-inf"))
    return value


@triton.jit
def ranks_of(scores, index, inside, count, stride, TILE: tl.constexpr):
    """How many of the `count` scores come before each of these: higher ones, and equal ones of lower index."""
    own = scores_at(scores, index, inside, stride)[:, None]
    rank = tl.zeros_like(index)
    for start in range(0, count, TILE):
        other = start + tl.arange(0, TILE)
        theirs = scores_at(scores, other, other < count, stride)[None, :]
        ahead = (theirs > own) | ((theirs == own) & (other[None, :] < index[:, None]))
        rank += tl.sum((ahead & (other < count)[None, :]).to(tl.int32), 1)
    return rank


@triton.jit
def keep_protected(packing, slot, leader, protected, TILE: tl.constexpr, MASKED: tl.constexpr):
    """The protected tokens lead the first slots."""
    for start in range(0, protected, TILE):
        rank = start + tl.arange(0, TILE)
        inside = rank < protected
        position = position_of(packing, rank, inside, MASKED)
        tl.store(slot + position, rank, mask=inside)
        tl.store(leader + rank, position, mask=inside)


@triton.jit
def fill_spare(leader, used, out, moved, gone, extra, TILE: tl.constexpr):
    """0 for the leaders of slots that a row with padding has not, its first leader for the moves that it has not."""
    for start in range(used, out, TILE):
        place = start + tl.arange(0, TILE)
        tl.store(leader + place, tl.zeros((TILE,), tl.int64), mask=place < out)
    tl.debug_barrier()
    first = tl.load(leader, mask=out > 0, other=0)
    for start in range(gone, extra, TILE):
        place = start + tl.arange(0, TILE)
        tl.store(moved + place, tl.zeros((TILE,), tl.int64) + first, mask=place < extra)


@triton.jit(do_not_specialize=COUNTS)
def ranks_kernel(scores, rank, count, stride, scores_batch, rank_batch, TILE: tl.constexpr):
    """`ranks_of` for one tile of a row without padding; grid (tiles, batch)."""
    batch = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    place = ranks_of(scores + batch * scores_batch, index, index < count, count, stride, TILE)
    tl.store(rank + batch * rank_batch + index, place, mask=index < count)


def rank_launch(architecture: Architecture, scores: Tensor, count: int, rank: Tensor) -> Launch:
    """rank[b, i] of the first `count` scores of each row."""
    config = architecture.config("ranks_kernel")
    arguments = {
        "scores": scores,
        "rank": rank,
        "count": count,
        "stride": scores.stride(1),
        "scores_batch": scores.stride(0),
        "rank_batch": rank.stride(0),
    }
    return Launch(ranks_kernel, (triton.cdiv(count, config.constants["TILE"]), scores.shape[0]), arguments, config)
