"""The kernel of `page_rank`: one launch, one program per image and head, which takes all steps.

Between steps the importance of N tokens goes through scratch memory that stays in the program's cache; the matrix is
read once a step.  A column's sum is taken in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture
from .launch import Launch, Twin, Work

COUNTS = ["tokens", "steps", "start_batch", "kept_batch"]


@triton.jit
def given_to_kept(matrix, kept, row, tokens, row_stride, column_stride, kept_token, COLUMNS: tl.constexpr):
    """[rows] what these rows hand to kept tokens."""
    given = tl.zeros_like(row).to(tl.float32)
    for low in range(0, tokens, COLUMNS):
        column = low + tl.arange(0, COLUMNS)
        at = matrix + row.to(tl.int64)[:, None] * row_stride + column[None, :] * column_stride
        tile = tl.load(at, mask=(row < tokens)[:, None] & (column < tokens)[None, :], other=0).to(tl.float32)
        keep = tl.load(kept + column * kept_token, mask=column < tokens, other=0).to(tl.float32)
        given += tl.sum(tile * keep[None, :], 1)
    return given


@triton.jit
def received(matrix, handed, column, tokens, row_stride, column_stride, ROWS: tl.constexpr):
    """[columns] what all rows hand to these columns."""
    total = tl.zeros_like(column).to(tl.float32)
    for low in range(0, tokens, ROWS):
        row = low + tl.arange(0, ROWS)
        at = matrix + row.to(tl.int64)[:, None] * row_stride + column[None, :] * column_stride
        tile = tl.load(at, mask=(row < tokens)[:, None] & (column < tokens)[None, :], other=0).to(tl.float32)
        hand = tl.load(handed + row, mask=row < tokens, other=0)
        total += tl.sum(tile * hand[:, None], 0)
    return total


@triton.jit(do_not_specialize=COUNTS)
def page_rank_kernel(
    attention, start, kept, weight, handed, result, tokens, steps,
    batch_stride, head_stride, row_stride, column_stride, start_batch, start_token, kept_batch, kept_token,
    MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Everything; grid (batch, heads).  A token hands on `handed`, split as its row of the matrix says."""
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    own = (batch * tl.num_programs(1) + head) * tokens
    matrix = attention + batch * batch_stride + head * head_stride
    for low in range(0, tokens, ROWS):
        row = low + tl.arange(0, ROWS)
        first = tl.load(start + batch * start_batch + row * start_token, mask=row < tokens, other=0).to(tl.float32)
        if MASKED:
            kept_row = kept + batch * kept_batch
            given = given_to_kept(matrix, kept_row, row, tokens, row_stride, column_stride, kept_token, COLUMNS)
            keep = tl.load(kept_row + row * kept_token, mask=row < tokens, other=0).to(tl.float32)
            part = keep / tl.where(given == 0, 1.0, given)
            tl.store(weight + own + row, part, mask=row < tokens)
            first *= part
        tl.store(handed + own + row, first, mask=row < tokens)
    for _ in range(steps):
        tl.debug_barrier()
        for low in range(0, tokens, COLUMNS):
            column = low + tl.arange(0, COLUMNS)
            total = received(matrix, handed + own, column, tokens, row_stride, column_stride, ROWS)
            tl.store(result + own + column, total, mask=column < tokens)
        tl.debug_barrier()
        for low in range(0, tokens, COLUMNS):
            column = low + tl.arange(0, COLUMNS)
            total = tl.load(result + own + column, mask=column < tokens, other=0)
            if MASKED:
                total *= tl.load(weight + own + column, mask=column < tokens, other=0)
            tl.store(handed + own + column, total, mask=column < tokens)
    if MASKED:
        tl.debug_barrier()
        for low in range(0, tokens, COLUMNS):
            column = low + tl.arange(0, COLUMNS)
            at = kept + batch * kept_batch + column * kept_token
            keep = tl.load(at, mask=column < tokens, other=0).to(tl.int1)
            total = tl.load(result + own + column, mask=column < tokens, other=0)
            tl.store(result + own + column, tl.where(keep, total, 0.0), mask=column < tokens)


def work(architecture: Architecture, attention: Tensor, start: Tensor, kept: Tensor | None, steps: int) -> Work:
    """One launch."""
    batch, heads, tokens = attention.shape[:3]
    result, handed = (attention.new_empty((batch, heads, tokens), dtype=torch.float32) for _ in range(2))
    arguments: dict[str, Any] = {
        **{"attention": attention, "start": start, "kept": kept, "handed": handed, "result": result},
        "weight": None if kept is None else torch.empty_like(handed),
        **{"tokens": tokens, "steps": steps},
        **dict(zip(("batch_stride", "head_stride", "row_stride", "column_stride"), attention.stride(), strict=True)),
        **dict(zip(("start_batch", "start_token"), start.stride(), strict=True)),
        **dict(zip(("kept_batch", "kept_token"), (0, 0) if kept is None else kept.stride(), strict=True)),
    }
    config = architecture.config("page_rank_kernel").having(MASKED=kept is not None)
    return [Launch(page_rank_kernel, (batch, heads), arguments, config)], result


def why_not(attention: Tensor, start: Tensor, kept: Tensor | None, steps: int) -> str:
    """Float64 is the tests' precision, not a GPU's."""
    return "attention in torch.float64" if attention.dtype == torch.float64 else ""


def examples() -> Iterator[tuple[Any, ...]]:
    """DeiT-S, whole and with tokens gone; a long row in half precision."""
    for batch, heads, tokens, dtype, masked in [
        (64, 6, 197, torch.float32, False),
        (64, 6, 197, torch.float32, True),
        (1, 16, 1025, torch.float16, True),
        (8, 12, 577, torch.bfloat16, False),
    ]:
        attention = torch.empty(batch, heads, tokens, tokens, dtype=dtype, device="meta")
        start = torch.empty(batch, tokens, device="meta")
        yield attention, start, torch.empty(batch, tokens, dtype=torch.bool, device="meta") if masked else None, 5


TWIN = Twin(work, examples, why_not)
