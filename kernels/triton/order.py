"""The kernel of `order_slots`: one launch, one program per row, which finds each slot's last token by comparing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture
from .launch import Launch, Twin, Work
from .selection import COUNTS, fill_spare, row_scratch


@triton.jit(do_not_specialize=COUNTS)
def order_kernel(
    slot, end, number, ordered, leader, moved, tokens, out, extra, slot_batch, slot_token, TILE: tl.constexpr
):
    """Everything, for rows of any length; grid (batch)."""
    batch = tl.program_id(0).to(tl.int64)
    slot, end, number = slot + batch * slot_batch, end + batch * tokens, number + batch * tokens
    ordered, leader, moved = ordered + batch * tokens, leader + batch * out, moved + batch * extra
    used = 0
    for start in range(0, tokens, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < tokens
        own = tl.load(slot + token * slot_token, mask=inside, other=-1)
        last = tl.full((TILE,), -1, tl.int32)
        for begin in range(0, tokens, TILE):
            other = begin + tl.arange(0, TILE)
            theirs = tl.load(slot + other * slot_token, mask=other < tokens, other=-1)
            last = tl.maximum(last, tl.max(tl.where(theirs[None, :] == own[:, None], other[None, :], -1), 1))
        leads = ((own >= 0) & (last == token)).to(tl.int32)
        place = used + tl.cumsum(leads, 0) - leads
        tl.store(end + token, tl.where(own >= 0, last, -1), mask=inside)
        tl.store(number + token, place, mask=inside)
        tl.store(leader + place, token, mask=leads > 0)
        used += tl.sum(leads, 0)
    tl.debug_barrier()
    gone = 0
    for start in range(0, tokens, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < tokens
        last = tl.load(end + token, mask=inside, other=-1)
        place = tl.load(number + last, mask=last >= 0, other=-1)
        moves = ((last >= 0) & (last != token)).to(tl.int32)
        tl.store(ordered + token, place, mask=inside)
        tl.store(moved + gone + tl.cumsum(moves, 0) - moves, token, mask=moves > 0)
        gone += tl.sum(moves, 0)
    fill_spare(leader, used, out, moved, gone, extra, TILE)


def work(architecture: Architecture, slot: Tensor, leader: Tensor, moved: Tensor | None) -> Work:
    """One launch."""
    batch, tokens = slot.shape
    out, extra = leader.shape[1], 0 if moved is None else moved.shape[1]
    results = tuple(slot.new_empty((batch, size)) for size in (tokens, out, extra))
    arguments: dict[str, Any] = {
        "slot": slot,
        "end": row_scratch(slot, tokens, torch.int32),
        "number": row_scratch(slot, tokens, torch.int32),
        **dict(zip(("ordered", "leader", "moved"), results, strict=True)),
        "tokens": tokens,
        "out": out,
        "extra": extra,
        "slot_batch": slot.stride(0),
        "slot_token": slot.stride(1),
    }
    return [Launch(order_kernel, (batch,), arguments, architecture.config("order_kernel"))], results


def examples() -> Iterator[tuple[Any, ...]]:
    """CLIP's text tower."""
    slot, leader, moved = (torch.empty(64, size, dtype=torch.int64, device="meta") for size in (77, 70, 7))
    yield slot, leader, moved


TWIN = Twin(work, examples)
