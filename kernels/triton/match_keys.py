"""The kernels of `match_keys`: the mean of the heads' keys and the matching on it, in one launch.

The program of a row first writes the mean keys of its tokens (float32, N x D x 4 bytes, which stay in its cache), then
matches them.  The keys are read once, from where they lie.  Rows of more than 1024 tokens get four launches, as in
`match`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...counts import HALF, CountRule, at_most
from .architecture import Architecture, Config
from .launch import Launch, Twin, Work
from .match import blocks, empty_plan, row_arguments, split_launches
from .match import why_not as why_not_match
from .match_tiles import match_row
from .selection import COUNTS, pack_row, removed_of, row_scratch, splits

_MOST_AT_ONCE = 8  # heads whose loads are under way together


@triton.jit
def mean_heads(
    keys, metric, start, tokens, key_head, key_token,
    HEADS: tl.constexpr, UNROLL: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of a tile of tokens: metric[i, :] = mean over heads of keys[h, i, :]."""
    token = start + tl.arange(0, ROWS)
    inside = token < tokens
    for low in range(0, WIDTH, COLUMNS):
        column = low + tl.arange(0, COLUMNS)
        mask = inside[:, None] if WIDTH % COLUMNS == 0 else inside[:, None] & (column < WIDTH)[None, :]
        at = keys + token.to(tl.int64)[:, None] * key_token + column[None, :]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for head in tl.range(0, HEADS, loop_unroll_factor=UNROLL):
            total += tl.load(at + tl.cast(head, tl.int64) * key_head, mask=mask, other=0).to(tl.float32)
        tl.store(metric + token[:, None] * WIDTH + column[None, :], total / HEADS, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def match_keys_kernel(
    keys, metric, valid, best, partner, packing, slot, leader, moved, tokens, out, half,
    prefix, limit, slope_0, offset_0, divisor_0, slope_1, offset_1, divisor_1,
    key_batch, key_head, key_token, valid_batch, valid_token,
    HEADS: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Everything, for rows of any length; grid (batch)."""
    batch = tl.program_id(0).to(tl.int64)
    keys, metric = keys + batch * key_batch, metric + batch * tokens * WIDTH
    slot, leader, moved = slot + batch * tokens, leader + batch * out, moved + batch * (tokens - out)
    for start in range(0, tokens, ROWS):
        mean_heads(keys, metric, start, tokens, key_head, key_token, HEADS, UNROLL, WIDTH, COLUMNS, ROWS)
    count = tokens
    if MASKED:
        packing += batch * (tokens + 1)
        pack_row(valid + batch * valid_batch, valid_token, packing, slot, tokens, TILE)
        count = tl.load(packing + tokens)
    tl.debug_barrier()
    removed = removed_of(count, prefix, limit, slope_0, offset_0, divisor_0, slope_1, offset_1, divisor_1)
    match_row(
        metric, packing, best + batch * half, partner + batch * half, slot, leader, moved, count, out, tokens - out,
        prefix, removed, WIDTH, WIDTH, BLOCK_A, BLOCK_B, BLOCK_D, TILE, PRECISION, MASKED,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def mean_heads_kernel(
    keys, metric, tokens, key_batch, key_head, key_token,
    HEADS: tl.constexpr, UNROLL: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`mean_heads` for one tile; grid (tiles, batch)."""
    batch = tl.program_id(1).to(tl.int64)
    mean_heads(
        keys + batch * key_batch, metric + batch * tokens * WIDTH, tl.program_id(0) * ROWS, tokens,
        key_head, key_token, HEADS, UNROLL, WIDTH, COLUMNS, ROWS,
    )  # fmt: skip


def work(
    architecture: Architecture, keys: Tensor, valid: Tensor | None, out: Any, prefix: int, rule: list[int]
) -> Work:
    """One launch, or four (see the module).  Keys whose features are not contiguous are copied first."""
    keys = keys if keys.stride(3) == 1 else keys.contiguous()
    batch, heads, tokens, width = keys.shape
    results = empty_plan(keys, out)
    metric = row_scratch(keys, tokens * width, torch.float32).view(batch, tokens, width)
    config, mean = blocks(architecture, metric), architecture.config("mean_heads_kernel")
    unroll = max(n for n in range(1, _MOST_AT_ONCE + 1) if heads % n == 0)
    mean = mean.having(HEADS=heads, UNROLL=unroll, COLUMNS=min(128, triton.next_power_of_2(width)))
    source = {"keys": keys, "key_batch": keys.stride(0), "key_head": keys.stride(1), "key_token": keys.stride(2)}
    if splits(tokens, valid):
        grid = (triton.cdiv(tokens, mean.constants["ROWS"]), batch)
        arguments = {**source, "metric": metric, "tokens": tokens}
        first = Launch(mean_heads_kernel, grid, arguments, mean.having(WIDTH=width))
        return [first, *split_launches(architecture, metric, results, prefix, config)], results
    arguments = {**row_arguments(metric, valid, results, prefix, rule), **source, "metric": metric}
    constants = {**config.constants, **mean.constants, "MASKED": valid is not None}
    return [Launch(match_keys_kernel, (batch,), arguments, Config(constants, mean.warps, config.stages))], results


def why_not(keys: Tensor, valid: Tensor | None, out: Any, prefix: int, rule: list[int]) -> str:
    """As for `bipartite_match`."""
    return why_not_match(keys, valid, out, prefix, rule)


def examples() -> Iterator[tuple[Any, ...]]:
    """ViT-B as timm lays its keys out, BERT with padding, a row of several programs."""
    for batch, heads, tokens, width, dtype, padded in [
        (256, 12, 197, 64, torch.bfloat16, False),
        (8, 12, 128, 64, torch.float32, True),
        (1, 16, 2305, 80, torch.bfloat16, False),
    ]:
        keys = torch.empty(batch, tokens, 3, heads, width, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)[1]
        valid = torch.empty(batch, tokens, dtype=torch.bool, device="meta") if padded else None
        rule = CountRule(1, (at_most(13), HALF))
        yield keys, valid, rule.out(tokens), 1, rule.flat()


TWIN = Twin(work, examples, why_not)
