"""The kernel of `attention`, which computes its log-sum-exp as well, or alone, on demand.

One program per tile of queries of a head, which goes over the keys once with a running maximum and sum (Milakov and
Gimelshein 2018, arXiv 1805.02867; Dao 2023, arXiv 2307.08691).  Tiles of keys that every query of the tile sees in full
come first and are not masked; the others (the last keys, the diagonal of a causal mask) follow in a second loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture
from .attention_tiles import (
    LN2,
    LOG2E,
    MaybeTensor,
    capped,
    keys_of,
    load_rows,
    mask_arguments,
    masked,
    padded,
    strides,
    unit_of,
    why_not,
    with_unit_columns,
)
from .launch import Launch, Twin, Work


@triton.jit
def sweep(
    mix, total, top, first, last, queries, begin, rows, keys, k, v, key_bias, mask, scale, cap,
    k_row, v_row, mask_row, mask_column,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr, NATURAL: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Go on with the weighted values `mix`, their weights' sum `total` and the running maximum over keys first..last.

    The queries are those from row `begin` on; the mask points to its row.
    PLAIN: logits are products times a positive scale, which the exponential's argument takes in one multiply-add.
    NATURAL: logits and their maximum are not times log2(e).
    """
    FACTOR: tl.constexpr = 1.0 if NATURAL else LOG2E
    row = tl.arange(0, ROWS)
    for start in range(first, last, KEYS):
        column = start + tl.arange(0, KEYS)
        tile = load_rows(k, start, keys, k_row, WIDTH, KEYS, D, UNIT, EDGE)
        logits = tl.dot(queries, tl.trans(tile), input_precision="ieee")
        if cap is not None:
            logits = capped(logits, scale, cap) * FACTOR
        elif not PLAIN:
            logits = logits * (scale * FACTOR)
        if key_bias is not None:
            logits += (tl.load(key_bias + column, mask=column < keys, other=0.0).to(tl.float32) * FACTOR)[None, :]
        if mask is not None:
            logits = masked(logits, mask, row[:, None], column[None, :], rows - begin, keys, mask_row, mask_column)
        if EDGE:
            seen = (column < keys)[None, :]
            if CAUSAL:
                seen = seen & (column[None, :] <= begin + row[:, None])
            logits = tl.where(seen, logits, -float("inf"))
        highest = tl.max(logits, 1)
        if PLAIN:
            highest = highest * (scale * LOG2E)
        highest = tl.maximum(top, highest)
        # a query that has seen no key yet has no maximum to subtract
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        exponent = (logits * (scale * LOG2E) if PLAIN else logits) - shift[:, None]
        fall = top - shift
        if NATURAL:
            exponent, fall = exponent * LOG2E, fall * LOG2E
        weights = tl.exp2(exponent)
        shrink = tl.exp2(fall)
        total = total * shrink + tl.sum(weights, 1)
        if v is not None:
            values = load_rows(v, start, keys, v_row, VALUE_WIDTH, KEYS, VALUE_D, UNIT, EDGE)
            mix = tl.dot(weights.to(values.dtype), values, mix * shrink[:, None], input_precision="ieee")
        top = highest
    return mix, total, top


COUNTS = ["rows", "keys", "bias_batch", "mask_batch", "mask_head", "mask_row", "lse_batch", "lse_head"]


@triton.jit(do_not_specialize=COUNTS)
def attention_kernel(
    q, k, v, key_bias, mask, out, lse, rows, keys, group, scale, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_batch,
    mask_batch, mask_head, mask_row, mask_column, out_batch, out_head, out_row, lse_batch, lse_head,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """out = softmax(logits) v and lse = log-sum-exp of the logits, each if given; grid (tiles of queries, H, B)."""
    tile, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if CAUSAL:  # the longest first
        tile = tl.num_programs(0) - 1 - tile
    begin = tile * ROWS
    row = begin + tl.arange(0, ROWS)
    shared = head // group
    q = q + tl.multiple_of(batch * q_batch + head * q_head, UNIT)
    queries = load_rows(q, begin, rows, q_row, WIDTH, ROWS, D, UNIT, True)
    k = k + tl.multiple_of(batch * k_batch + shared * k_head, UNIT)
    if v is not None:
        v = v + tl.multiple_of(batch * v_batch + shared * v_head, UNIT)
    if key_bias is not None:
        key_bias = key_bias + batch * bias_batch
    if mask is not None:
        mask = mask + batch * mask_batch + head * mask_head + tl.cast(begin, tl.int64) * mask_row
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mix = tl.zeros([ROWS, VALUE_D], tl.float32)
    whole, last = keys, keys
    if CAUSAL:
        whole, last = tl.minimum(begin + 1, keys), tl.minimum(begin + ROWS, keys)
    whole = whole // KEYS * KEYS
    mix, total, top = sweep(
        mix, total, top, 0, whole, queries, begin, rows, keys, k, v, key_bias, mask, scale, cap,
        k_row, v_row, mask_row, mask_column, WIDTH, VALUE_WIDTH, D, VALUE_D, UNIT, ROWS, KEYS, CAUSAL, PLAIN, NATURAL,
        False,
    )  # fmt: skip
    mix, total, top = sweep(
        mix, total, top, whole, last, queries, begin, rows, keys, k, v, key_bias, mask, scale, cap,
        k_row, v_row, mask_row, mask_column, WIDTH, VALUE_WIDTH, D, VALUE_D, UNIT, ROWS, KEYS, CAUSAL, PLAIN, NATURAL,
        True,
    )  # fmt: skip
    if lse is not None:
        sums = top + tl.log2(total) * LN2 if NATURAL else (top + tl.log2(total)) * LN2
        tl.store(lse + batch * lse_batch + head * lse_head + row, sums, mask=row < rows)
    if out is not None:
        column = tl.arange(0, VALUE_D)
        place = out + batch * out_batch + head * out_head + row.to(tl.int64)[:, None] * out_row + column[None, :]
        inside = (row < rows)[:, None] & (column < VALUE_WIDTH)[None, :]
        mix = mix / tl.where(total == 0, 1.0, total)[:, None]  # a query that sees no key gets zeros
        tl.store(place, mix.to(out.dtype.element_ty), mask=inside)


def launched(
    architecture: Architecture,
    q: Tensor,
    k: Tensor,
    v: MaybeTensor,
    key_bias: MaybeTensor,
    mask: MaybeTensor,
    scale: float,
    causal: bool,
    softcap: float | None = None,
    *,
    lse: bool,
) -> tuple[Launch, MaybeTensor, MaybeTensor]:
    """One launch, and the results it fills: attention (where values are given) and log-sum-exp (where asked for).

    The output lies in memory as [B, N, H, D], so that joining the heads copies nothing.
    """
    batch, heads, rows, width = q.shape
    keys, value_width = k.shape[2], width if v is None else v.shape[3]
    q, k, v, key_bias = (with_unit_columns(x) for x in (q, k, v, key_bias))
    out = None if v is None else q.new_empty((batch, rows, heads, value_width)).transpose(1, 2)
    sums = q.new_empty((batch, heads, rows), dtype=torch.float32) if lse else None
    kind = "" if mask is None else "mask"
    config = architecture.config("attention_kernel", *keys_of(max(width, value_width), q, kind))
    arguments: dict[str, Any] = {
        **{"q": q, "k": k, "v": v, "key_bias": key_bias, "out": out, "lse": sums, "rows": rows, "keys": keys},
        **{"group": heads // k.shape[1], "scale": scale, "cap": softcap},
        **strides("q", q, "batch", "head", "row"),
        **strides("k", k, "batch", "head", "row"),
        **strides("v", v, "batch", "head", "row"),
        **strides("bias", key_bias, "batch"),
        **mask_arguments(mask, batch, heads, rows, keys),
        **strides("out", out, "batch", "head", "row"),
        **strides("lse", sums, "batch", "head"),
    }
    plain = key_bias is None and mask is None and softcap is None and scale > 0
    widths = {"WIDTH": width, "VALUE_WIDTH": value_width, "D": padded(width), "VALUE_D": padded(value_width)}
    natural = mask is not None and mask.dtype != torch.bool
    config = config.having(**widths, UNIT=unit_of(q, k, v), CAUSAL=causal, PLAIN=plain, NATURAL=natural)
    grid = (triton.cdiv(rows, config.constants["ROWS"]), heads, batch)
    return Launch(attention_kernel, grid, arguments, config), out, sums


def work(architecture: Architecture, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Work:
    """One launch."""
    launch, out, _ = launched(architecture, q, k, v, *rest, lse=False)
    return [launch], out


def refuses(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str:
    """Other number types and head sizes."""
    return why_not(q, k, v)


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    """[B, H, N, D] as the projection of queries, keys and values leaves it: heads beside each other."""
    batch, heads, rows, width = shape
    return torch.empty(batch, rows, 3, heads, width, dtype=dtype, device="meta")[:, :, 0].transpose(1, 2)


def bias_of(x: Tensor) -> Tensor:
    """A bias for each key."""
    return torch.empty(x.shape[0], x.shape[2], device="meta")


def examples() -> Iterator[tuple[Any, ...]]:
    """ViT-B, ViT-L after merging, BEiT's table, SigLIP's head size, a Llama's prefill, masked, capped; float32."""
    small, large = meta(torch.bfloat16, 256, 12, 197, 64), meta(torch.float16, 256, 16, 577, 64)
    yield small, small, small, None, None, 0.125, False
    yield large, large, large, bias_of(large), None, 0.125, False
    yield small, small, small, None, torch.empty(12, 197, 197, dtype=torch.bfloat16, device="meta"), 0.125, False
    odd = meta(torch.float16, 8, 16, 729, 72)
    yield odd, odd, odd, bias_of(odd), None, 72**-0.5, False
    q, k = meta(torch.bfloat16, 1, 32, 8192, 128), meta(torch.bfloat16, 1, 8, 8192, 128)
    yield q, k, k, None, None, 128**-0.5, True
    yield q, k, k, bias_of(k), torch.empty(1, 1, 8192, 8192, dtype=torch.bool, device="meta"), 0.1, False
    yield q, k, k, bias_of(k), None, 0.1, True, 50.0
    full = meta(torch.float32, 8, 12, 197, 128)
    yield full, full, full, bias_of(full), None, 0.1, False


TWIN = Twin(work, examples, refuses)
