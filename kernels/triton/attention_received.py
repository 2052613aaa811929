"""The kernel of `attention_received`: a second pass over queries and keys from the log-sum-exp.

One program per tile of keys of a head, which goes over the queries in order and keeps the sums: no atomics, so that
the same numbers come out every time.  Under a causal mask it starts at the first query that sees the tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention_tiles
from .architecture import Architecture
from .attention import bias_of, meta
from .attention_tiles import (
    LOG2E,
    MaybeTensor,
    keys_of,
    load_rows,
    mask_arguments,
    masked,
    padded,
    strides,
    unit_of,
    with_unit_columns,
)
from .launch import Launch, Twin, Work

COUNTS = ["rows", "keys", "lse_batch", "lse_head", "bias_batch", "weight_batch", "out_batch", "out_head"]
COUNTS += ["mask_batch", "mask_head", "mask_row"]


@triton.jit(do_not_specialize=COUNTS)
def attention_received_kernel(
    q, k, lse, key_bias, mask, weight, out, rows, keys, group, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, lse_batch, lse_head, bias_batch, weight_batch,
    mask_batch, mask_head, mask_row, mask_column, out_batch, out_head,
    WIDTH: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """out[b, h, j] = sum_i weight[b, i] exp(logit[b, h, i, j] - lse[b, h, i]) / sum; grid (tiles of keys, H, B)."""
    begin, head, batch = tl.program_id(0) * KEYS, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    near = tl.arange(0, KEYS)
    column = begin + near
    q = q + tl.multiple_of(batch * q_batch + head * q_head, UNIT)
    k = k + tl.multiple_of(batch * k_batch + head // group * k_head, UNIT)
    tile = load_rows(k, begin, keys, k_row, WIDTH, KEYS, D, UNIT, True)
    lse = lse + batch * lse_batch + head * lse_head
    if key_bias is not None:
        key_bias = tl.load(key_bias + batch * bias_batch + column, mask=column < keys, other=0.0).to(tl.float32)
    if mask is not None:
        mask = mask + batch * mask_batch + head * mask_head + tl.cast(begin, tl.int64) * mask_column
    if weight is not None:
        weight = weight + batch * weight_batch
        mass = tl.zeros([ROWS], tl.float32)
        for start in range(0, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            mass += tl.load(weight + row, mask=row < rows, other=0).to(tl.float32)
        total = tl.sum(mass, 0)
    else:
        total = tl.cast(rows, tl.float32)
    first = begin // ROWS * ROWS if CAUSAL else 0
    sums = tl.zeros([KEYS], tl.float32)
    for start in range(first, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        queries = load_rows(q, start, rows, q_row, WIDTH, ROWS, D, UNIT, True)
        logits = tl.dot(tile, tl.trans(queries), input_precision="ieee") * scale
        if key_bias is not None:
            logits += key_bias[:, None]
        if mask is not None:
            logits = masked(logits, mask, row[None, :], near[:, None], rows, keys - begin, mask_row, mask_column)
        if CAUSAL:
            logits = tl.where(column[:, None] <= row[None, :], logits, -float("inf"))
        # beyond the last query, and where one sees no key, nothing is attended to
        norm = tl.load(lse + row, mask=row < rows, other=float("inf")).to(tl.float32)
        norm = tl.where(norm == -float("inf"), float("inf"), norm)
        share = tl.exp2((logits - norm[None, :]) * LOG2E)
        if weight is not None:
            share = share * tl.load(weight + row, mask=row < rows, other=0).to(tl.float32)[None, :]
        sums += tl.sum(share, 1)
    place = out + batch * out_batch + head * out_head + column
    tl.store(place, sums / tl.where(total == 0, 1.0, total), mask=column < keys)


def work(
    architecture: Architecture,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    key_bias: MaybeTensor,
    mask: MaybeTensor,
    weight: MaybeTensor,
    scale: float,
    causal: bool,
) -> Work:
    """One launch."""
    batch, heads, rows, width = q.shape
    keys = k.shape[2]
    q, k = with_unit_columns(q), with_unit_columns(k)
    lse, key_bias, weight = (with_unit_columns(x) for x in (lse, key_bias, weight))
    out = q.new_empty((batch, heads, keys), dtype=torch.float32)
    config = architecture.config("attention_received_kernel", *keys_of(width, q, "" if mask is None else "mask"))
    arguments: dict[str, Any] = {
        **{"q": q, "k": k, "lse": lse, "key_bias": key_bias, "weight": weight, "out": out},
        **{"rows": rows, "keys": keys, "group": heads // k.shape[1], "scale": scale},
        **strides("q", q, "batch", "head", "row"),
        **strides("k", k, "batch", "head", "row"),
        **strides("lse", lse, "batch", "head"),
        **strides("bias", key_bias, "batch"),
        **strides("weight", weight, "batch"),
        **mask_arguments(mask, batch, heads, rows, keys),
        **strides("out", out, "batch", "head"),
    }
    config = config.having(WIDTH=width, D=padded(width), UNIT=unit_of(q, k), CAUSAL=causal)
    grid = (triton.cdiv(keys, config.constants["KEYS"]), heads, batch)
    return [Launch(attention_received_kernel, grid, arguments, config)], out


def why_not(q: Tensor, k: Tensor, *_: Any) -> str:
    """Other number types and head sizes."""
    return attention_tiles.why_not(q, k)


def examples() -> Iterator[tuple[Any, ...]]:
    """ViT-L after merging, padded; a Llama's prefill; a table for pairs of tokens."""
    large = meta(torch.float16, 256, 16, 577, 64)
    lse, valid = torch.empty(256, 16, 577, device="meta"), torch.empty(256, 577, dtype=torch.bool, device="meta")
    yield large, large, lse, bias_of(large), None, valid, 0.125, False
    q, k = meta(torch.bfloat16, 1, 32, 8192, 128), meta(torch.bfloat16, 1, 8, 8192, 128)
    yield q, k, torch.empty(1, 32, 8192, device="meta"), None, None, None, 128**-0.5, True
    table = torch.empty(16, 577, 577, dtype=torch.float16, device="meta")
    yield large, large, lse, None, table, None, 0.125, False


TWIN = Twin(work, examples, why_not)
