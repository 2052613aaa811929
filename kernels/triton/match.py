"""The kernels of `bipartite_match`: one launch, one program per row, similarities that never leave the chip.

    for every tile of a:  for every tile of b:  a b^T on tensor cores, divided by the norms; running maximum and partner
    rank of each maximum among all (by counting), and from it slot, leader and moved

Products of 16-bit numbers are exact in float32.  Float32 products are made of three in TF32 where the table says so:
22 of 24 bits of each factor, an error of the size of float32's own rounding.  The norm divides after the product; a
token without a usable norm counts as zero then, so what its row or column of products held does not matter.

Rows of more than 1024 tokens, where that is known beforehand and nothing is padding, get three launches, of which the
first two have one program per tile: with one program per row, at 4096 tokens, ranking alone would take 2048^2
comparisons on one multiprocessor.
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
from .match_tiles import find_partners, match_row, write_plan
from .selection import (
    COUNTS,
    pack_row,
    rank_launch,
    removed_of,
    row_scratch,
    rule_arguments,
    rule_does_not_fit,
    splits,
)

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@triton.jit(do_not_specialize=COUNTS)
def match_kernel(
    metric, valid, best, partner, packing, slot, leader, moved, tokens, out, half,
    prefix, limit, slope_0, offset_0, divisor_0, slope_1, offset_1, divisor_1,
    metric_batch, metric_token, valid_batch, valid_token,
    WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Everything, for rows of any length; grid (batch)."""
    batch = tl.program_id(0).to(tl.int64)
    slot, leader, moved = slot + batch * tokens, leader + batch * out, moved + batch * (tokens - out)
    count = tokens
    if MASKED:
        packing += batch * (tokens + 1)
        pack_row(valid + batch * valid_batch, valid_token, packing, slot, tokens, TILE)
        count = tl.load(packing + tokens)
    removed = removed_of(count, prefix, limit, slope_0, offset_0, divisor_0, slope_1, offset_1, divisor_1)
    match_row(
        metric + batch * metric_batch, packing, best + batch * half, partner + batch * half, slot, leader, moved,
        count, out, tokens - out, prefix, removed, metric_token,
        WIDTH, BLOCK_A, BLOCK_B, BLOCK_D, TILE, PRECISION, MASKED,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def partners_kernel(
    metric, best, partner, tokens, half, prefix, metric_batch, metric_token,
    WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`find_partners` for one tile of a row without padding; grid (tiles of a, batch)."""
    batch = tl.program_id(1).to(tl.int64)
    find_partners(
        metric + batch * metric_batch, None, best + batch * half, partner + batch * half, tl.program_id(0) * BLOCK_A,
        tokens, prefix, metric_token, WIDTH, BLOCK_A, BLOCK_B, BLOCK_D, PRECISION, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def match_plan_kernel(best, partner, rank, slot, leader, moved, tokens, out, half, prefix, TILE: tl.constexpr):
    """`write_plan` for a row without padding, from its ranks; grid (batch)."""
    batch = tl.program_id(0).to(tl.int64)
    write_plan(
        best, partner + batch * half, rank + batch * half, None, slot + batch * tokens, leader + batch * out,
        moved + batch * (tokens - out), tokens, out, tokens - out, prefix, tokens - out, TILE, True, False,
    )  # fmt: skip


def work(
    architecture: Architecture, metric: Tensor, valid: Tensor | None, out: Any, prefix: int, rule: list[int]
) -> Work:
    """One launch, or three (see the module).  A metric whose features are not contiguous is copied first."""
    metric = metric if metric.stride(2) == 1 else metric.contiguous()
    results = empty_plan(metric, out)
    config = blocks(architecture, metric)
    if splits(metric.shape[1], valid):
        return split_launches(architecture, metric, results, prefix, config), results
    arguments = row_arguments(metric, valid, results, prefix, rule)
    arguments |= {"metric": metric, "metric_batch": metric.stride(0), "metric_token": metric.stride(1)}
    return [Launch(match_kernel, (metric.shape[0],), arguments, config.having(MASKED=valid is not None))], results


def empty_plan(like: Tensor, out: Any) -> tuple[Tensor, Tensor, Tensor]:
    """slot, leader and moved, to be filled."""
    batch, tokens = like.shape[0], like.shape[-2]
    slot, leader, moved = (like.new_empty((batch, size), dtype=torch.int64) for size in (tokens, out, tokens - out))
    return slot, leader, moved


def blocks(architecture: Architecture, metric: Tensor, kernel: str = "match_kernel") -> Config:
    """Of a matching of metric [..., D]; features are taken in pieces of at most BLOCK_D."""
    width = metric.shape[-1]
    config = architecture.config(kernel, _NAMES[metric.dtype])
    piece = min(config.constants["BLOCK_D"], max(16, triton.next_power_of_2(width)))
    return config.having(WIDTH=width, BLOCK_D=piece)


def row_arguments(
    like: Tensor, valid: Tensor | None, results: tuple[Tensor, Tensor, Tensor], prefix: int, rule: list[int]
) -> dict[str, Any]:
    """What a program needs to make the plan of one row of [B, ..., N, D]: all but the metric."""
    slot, leader, moved = results
    tokens = like.shape[-2]
    half = (tokens + 1) // 2
    return {
        "valid": valid,
        "best": row_scratch(like, half, torch.float32),
        "partner": row_scratch(like, half, torch.int32),
        "packing": None if valid is None else row_scratch(like, tokens + 1, torch.int32),
        "slot": slot,
        "leader": leader,
        "moved": moved,
        "tokens": tokens,
        "out": leader.shape[1],
        "half": half,
        "valid_batch": 0 if valid is None else valid.stride(0),
        "valid_token": 0 if valid is None else valid.stride(1),
        **rule_arguments(prefix, rule),
    }


def split_launches(
    architecture: Architecture, metric: Tensor, results: tuple[Tensor, Tensor, Tensor], prefix: int, config: Config
) -> list[Launch]:
    """Partners by tile, ranks by tile, and the plan of each row; rows without padding."""
    slot, leader, moved = results
    batch, tokens = slot.shape
    half = (tokens + 1) // 2
    count = (max(tokens - prefix - prefix % 2, 0) + 1) // 2
    best, partner, rank = (row_scratch(metric, half, kind) for kind in (torch.float32, torch.int32, torch.int32))
    shared = {"best": best, "partner": partner, "tokens": tokens, "half": half, "prefix": prefix}
    strides = {"metric_batch": metric.stride(0), "metric_token": metric.stride(1)}
    constants = {name: value for name, value in config.constants.items() if name != "TILE"}
    plan = {"rank": rank, "slot": slot, "leader": leader, "moved": moved, "out": leader.shape[1]}
    tile = {"TILE": config.constants["TILE"]}
    return [
        Launch(
            partners_kernel,
            (triton.cdiv(count, constants["BLOCK_A"]), batch),
            {**shared, **strides, "metric": metric},
            Config(constants, config.warps, config.stages),
        ),
        rank_launch(architecture, best, count, rank),
        Launch(match_plan_kernel, (batch,), {**shared, **plan}, Config(tile, config.warps, 1)),
    ]


def why_not(metric: Tensor, valid: Tensor | None, out: Any, prefix: int, rule: list[int]) -> str:
    """Float64 is the tests' precision, not a GPU's."""
    return rule_does_not_fit(rule) if metric.dtype in _NAMES else f"a metric in {metric.dtype}"


def examples() -> Iterator[tuple[Any, ...]]:
    """ViT-B; text with padding; a wide metric; a row of several programs."""
    for batch, tokens, width, dtype, padded in [
        (256, 197, 64, torch.bfloat16, False),
        (8, 128, 80, torch.float32, True),
        (2, 1000, 320, torch.float16, False),
        (1, 4097, 64, torch.bfloat16, False),
    ]:
        metric = torch.empty(batch, tokens, width, dtype=dtype, device="meta")
        valid = torch.empty(batch, tokens, dtype=torch.bool, device="meta") if padded else None
        rule = CountRule(1, (at_most(13), HALF))
        yield metric, valid, rule.out(tokens), 1, rule.flat()


TWIN = Twin(work, examples, why_not)
