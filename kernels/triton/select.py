"""The kernel of `select_tokens`: one launch, one program per row, which ranks by counting and sorts nothing.

Rows of more than 1024 tokens, where that is known beforehand and nothing is padding, are ranked by a launch before it,
with one program per tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...counts import ALL, CountRule, keep_at_least
from .architecture import Architecture
from .launch import Launch, Twin, Work
from .selection import (
    COUNTS,
    fill_spare,
    keep_protected,
    pack_row,
    position_of,
    rank_launch,
    ranks_of,
    removed_of,
    row_scratch,
    rule_arguments,
    rule_does_not_fit,
    splits,
)


@triton.jit
def pack_scores(scores, packing, packed, free, scores_token, TILE: tl.constexpr):
    """The scores of the unprotected real tokens, whose positions `packing` lists."""
    for start in range(0, free, TILE):
        index = start + tl.arange(0, TILE)
        position = tl.load(packing + index, mask=index < free, other=0)
        tl.store(packed + index, tl.load(scores + position * scores_token), mask=index < free)
    tl.debug_barrier()


@triton.jit
def write_ranks(scores, stride, rank, free, TILE: tl.constexpr):
    """Where each score comes in falling order."""
    for start in range(0, free, TILE):
        index = start + tl.arange(0, TILE)
        tl.store(rank + index, ranks_of(scores, index, index < free, free, stride, TILE), mask=index < free)
    tl.debug_barrier()


@triton.jit
def write_selection(
    rank, packing, slot, leader, moved, protected, free, kept,
    IN_ORDER: tl.constexpr, FUSE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """slot, leader and moved of the `free` unprotected tokens, of which `kept` stay."""
    before, gone = 0, 0
    for start in range(0, free, TILE):
        index = start + tl.arange(0, TILE)
        inside = index < free
        place = tl.load(rank + index, mask=inside, other=0)
        position = position_of(packing, protected + index, inside, MASKED)
        keeps = (inside & (place < kept)).to(tl.int32)
        order = before + tl.cumsum(keeps, 0) - keeps if IN_ORDER else place
        if FUSE:
            # the first of the dropped leads their slot, which is the one after the kept
            goal = protected + tl.where(place < kept, order, kept)
            moves = (inside & (place > kept)).to(tl.int32)
            tl.store(slot + position, goal, mask=inside)
            tl.store(leader + goal, position, mask=inside & (place <= kept))
            tl.store(moved + gone + tl.cumsum(moves, 0) - moves, position, mask=moves > 0)
            gone += tl.sum(moves, 0)
        else:
            tl.store(slot + position, tl.where(place < kept, protected + order, -1), mask=inside)
            tl.store(leader + protected + order, position, mask=keeps > 0)
        before += tl.sum(keeps, 0)
    return gone


@triton.jit(do_not_specialize=COUNTS)
def select_kernel(
    scores, valid, packed, packing, rank, slot, leader, moved, tokens, out, extra,
    prefix, limit, slope_0, offset_0, divisor_0, slope_1, offset_1, divisor_1,
    scores_batch, scores_token, valid_batch, valid_token,
    IN_ORDER: tl.constexpr, FUSE: tl.constexpr, TILE: tl.constexpr, RANKED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Everything, or with RANKED all but the ranks; grid (batch)."""
    batch = tl.program_id(0).to(tl.int64)
    scores, slot = scores + batch * scores_batch, slot + batch * tokens
    leader, moved = leader + batch * out, moved + batch * extra
    count = tokens
    if MASKED:
        packing += batch * (tokens + 1)
        pack_row(valid + batch * valid_batch, valid_token, packing, slot, tokens, TILE)
        count = tl.load(packing + tokens)
    removed = removed_of(count, prefix, limit, slope_0, offset_0, divisor_0, slope_1, offset_1, divisor_1)
    protected = tl.minimum(count, prefix)
    free = count - protected
    # a rule may say more than a row has
    removed = tl.minimum(removed, free)
    kept = free - removed
    rank += batch * tokens
    if MASKED:
        packed += batch * tokens
        pack_scores(scores, packing + protected, packed, free, scores_token, TILE)
        write_ranks(packed, 1, rank, free, TILE)
    elif not RANKED:
        write_ranks(scores + protected * scores_token, scores_token, rank, free, TILE)
    gone = write_selection(rank, packing, slot, leader, moved, protected, free, kept, IN_ORDER, FUSE, TILE, MASKED)
    keep_protected(packing, slot, leader, protected, TILE, MASKED)
    if MASKED:
        fused = tl.minimum(removed, 1) if FUSE else 0
        fill_spare(leader, protected + kept + fused, out, moved, gone, extra, TILE)


def work(
    architecture: Architecture,
    scores: Tensor,
    valid: Tensor | None,
    out: Any,
    prefix: int,
    rule: list[int],
    order: str,
    fuse: bool,
) -> Work:
    """One launch, or two (see the module)."""
    batch, tokens = scores.shape
    extra = tokens - out if fuse else 0
    slot, leader, moved = (scores.new_empty((batch, size), dtype=torch.int64) for size in (tokens, out, extra))
    masked, split = valid is not None, splits(tokens, valid)
    rank = row_scratch(scores, tokens, torch.int32)
    arguments = {
        "scores": scores,
        "valid": valid,
        "packed": row_scratch(scores, tokens, scores.dtype) if masked else None,
        "packing": row_scratch(scores, tokens + 1, torch.int32) if masked else None,
        "rank": rank,
        "slot": slot,
        "leader": leader,
        "moved": moved,
        "tokens": tokens,
        "out": out,
        "extra": extra,
        "scores_batch": scores.stride(0),
        "scores_token": scores.stride(1),
        "valid_batch": 0 if valid is None else valid.stride(0),
        "valid_token": 0 if valid is None else valid.stride(1),
        **rule_arguments(prefix, rule),
    }
    config = architecture.config("select_kernel").having(
        IN_ORDER=order == "original", FUSE=fuse, RANKED=split, MASKED=masked
    )
    launches = [Launch(select_kernel, (batch,), arguments, config)]
    if split:
        launches.insert(0, rank_launch(architecture, scores[:, prefix:], tokens - prefix, rank))
    return launches, (slot, leader, moved)


def why_not(scores: Tensor, valid: Tensor | None, out: Any, prefix: int, rule: list[int], *_: Any) -> str:
    """Rules with more terms than a kernel takes."""
    return rule_does_not_fit(rule)


def examples() -> Iterator[tuple[Any, ...]]:
    """EViT on ViT-B, a random drop of padded rows, a row of several programs."""
    for batch, tokens, dtype, order, fuse, padded in [
        (256, 197, torch.float32, "original", True, False),
        (8, 512, torch.int64, "score", False, True),
        (1, 4096, torch.float32, "original", False, False),
    ]:
        scores = torch.empty(batch, tokens, dtype=dtype, device="meta")
        valid = torch.empty(batch, tokens, dtype=torch.bool, device="meta") if padded else None
        rule = CountRule(1, (keep_at_least(0.7), ALL), added=int(fuse))
        yield scores, valid, rule.out(tokens), 1, rule.flat(), order, fuse


TWIN = Twin(work, examples, why_not)
