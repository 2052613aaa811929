"""The kernel of `attention_rows`: one program per query, which writes its logits, then the probabilities over them.

The keys are read once, where they lie; the logits stay in the cache of the program that wrote them.  Few queries are
meant (the class token's): their product with the keys is bandwidth, not tensor cores.
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

COUNTS = ["rows", "keys", "q_batch", "bias_batch", "mask_batch", "mask_head", "mask_row"]


@triton.jit(do_not_specialize=[*COUNTS, "out_batch", "out_head", "out_row"])
def attention_rows_kernel(
    q, k, key_bias, mask, out, rows, keys, group, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, bias_batch,
    mask_batch, mask_head, mask_row, mask_column, out_batch, out_head, out_row,
    WIDTH: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """out[b, h, r, :] = softmax of the logits of query r; NaN where it sees no key; grid (R, H, B)."""
    row, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    column, feature = tl.arange(0, KEYS), tl.arange(0, D)
    q = q + batch * q_batch + head * q_head + row.to(tl.int64) * q_row
    query = tl.load(q + feature, mask=feature < WIDTH, other=0.0).to(tl.float32) * scale
    k = k + tl.multiple_of(batch * k_batch + head // group * k_head, UNIT)
    out = out + batch * out_batch + head * out_head + row.to(tl.int64) * out_row
    if key_bias is not None:
        key_bias = key_bias + batch * bias_batch
    if mask is not None:
        mask = mask + batch * mask_batch + head * mask_head + row.to(tl.int64) * mask_row
    top = tl.full([KEYS], -float("inf"), tl.float32)
    total = tl.zeros([KEYS], tl.float32)
    for start in range(0, keys, KEYS):
        place = start + column
        tile = load_rows(k, start, keys, k_row, WIDTH, KEYS, D, UNIT, True).to(tl.float32)
        logits = tl.sum(tile * query[None, :], 1)
        if key_bias is not None:
            logits += tl.load(key_bias + place, mask=place < keys, other=0.0).to(tl.float32)
        if mask is not None:
            logits = masked(logits, mask, column * 0, place, rows, keys, mask_row, mask_column)
        logits = tl.where(place < keys, logits, -float("inf"))
        tl.store(out + place, logits, mask=place < keys)
        # every lane keeps a maximum and a sum of its own: they meet once, behind the loop
        highest = tl.maximum(top, logits)
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        total = total * tl.exp2((top - shift) * LOG2E) + tl.exp2((logits - shift) * LOG2E)
        top = highest
    peak = tl.max(top, 0)
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    whole = tl.sum(total * tl.exp2((top - shift) * LOG2E), 0)
    tl.debug_barrier()  # what is read below was written by other threads
    for start in range(0, keys, KEYS):
        place = start + column
        logits = tl.load(out + place, mask=place < keys, other=0.0)
        tl.store(out + place, tl.exp2((logits - peak) * LOG2E) / whole, mask=place < keys)


def work(
    architecture: Architecture, queries: Tensor, k: Tensor, key_bias: MaybeTensor, mask: MaybeTensor, scale: float
) -> Work:
    """One launch."""
    batch, heads, rows, width = queries.shape
    keys = k.shape[2]
    queries, k, key_bias = (with_unit_columns(x) for x in (queries, k, key_bias))
    out = queries.new_empty((batch, heads, rows, keys), dtype=torch.float32)
    config = architecture.config("attention_rows_kernel", *keys_of(width, k))
    arguments: dict[str, Any] = {
        **{"q": queries, "k": k, "key_bias": key_bias, "out": out},
        **{"rows": rows, "keys": keys, "group": heads // k.shape[1], "scale": scale},
        **strides("q", queries, "batch", "head", "row"),
        **strides("k", k, "batch", "head", "row"),
        **strides("bias", key_bias, "batch"),
        **mask_arguments(mask, batch, heads, rows, keys),
        **strides("out", out, "batch", "head", "row"),
    }
    config = config.having(WIDTH=width, D=padded(width), UNIT=unit_of(k))
    return [Launch(attention_rows_kernel, (rows, heads, batch), arguments, config)], out


def why_not(queries: Tensor, k: Tensor, *_: Any) -> str:
    """Other number types and head sizes."""
    return attention_tiles.why_not(queries, k)


def examples() -> Iterator[tuple[Any, ...]]:
    """The class token of ViT-L after merging, and of BEiT with its row of the table; float32."""
    for dtype, table in [(torch.float16, False), (torch.bfloat16, True), (torch.float32, False)]:
        k = meta(dtype, 256, 16, 577, 64)
        row = torch.empty(16, 1, 577, dtype=dtype, device="meta") if table else None
        yield k[:, :, :1], k, None if table else bias_of(k), row, 0.125


TWIN = Twin(work, examples, why_not)
