"""The kernel of `block_sparse_received`: one program per tile of keys of a head, which goes over the rows of queries.

A program reads the lists of every row to find those that name some of its keys, and multiplies with their queries
only; it keeps the sums, so that nothing is added from two places and the same numbers come out every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sparse_pairs import Pairs
from . import attention_tiles, block_sparse_attention
from .architecture import Architecture
from .attention_tiles import LOG2E, MaybeTensor, capped, keys_of, padded, strides, with_unit_columns
from .launch import Launch, Twin, Work

COUNTS = ["tokens", "first", "last", "tile_count", "column_count", "tile_row", "column_row", "order_batch"]
COUNTS += ["order_head", "lse_batch", "lse_head", "weight_batch", "out_batch", "out_head"]


@triton.jit
def named(found, place, starts, count, SPAN: tl.constexpr, SCAN: tl.constexpr):
    """found [KEYS], or 1 where one of the spans that begin at starts [count] holds the place; -1 begins none."""
    for at in range(0, count, SCAN):
        slot = at + tl.arange(0, SCAN)
        begin = tl.load(starts + slot, mask=slot < count, other=-1)
        apart = place[:, None] - begin[None, :]
        hit = (begin >= 0)[None, :] & (apart >= 0) & (apart < SPAN)
        found = tl.maximum(found, tl.max(hit.to(tl.int32), 1))
    return found


@triton.jit
def given(
    sums, keys, listed, position, start, stop, end, q, lse, weight, first, last, scale, cap, q_row,
    WIDTH: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, SINK: tl.constexpr, LOCAL: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """sums [KEYS] with what queries start .. stop - 1 give, at most ROWS of them; those from `end` on give nothing."""
    query = start + tl.arange(0, ROWS)
    here = (query < stop) & (query < end)
    dense = (query < first) | (query >= end - last)
    share = tl.where(here, 1.0, 0.0)
    if weight is not None:
        share = tl.load(weight + query, mask=here, other=0).to(tl.float32)
    near = tl.abs(position[:, None] - query[None, :]) < LOCAL
    seen = (listed > 0)[:, None] | (position < SINK)[:, None] | near | dense[None, :]
    seen = seen & here[None, :] & (position >= 0)[:, None] & (position < end)[:, None] & (share != 0.0)[None, :]
    if CAUSAL:
        seen = seen & (position[:, None] <= query[None, :])
    if WINDOW > 0:
        seen = seen & (tl.abs(position[:, None] - query[None, :]) < WINDOW)
    if tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0:
        column = tl.arange(0, D)
        inside = here[:, None] & (column < WIDTH)[None, :]
        queries = tl.load(q + query.to(tl.int64)[:, None] * q_row + column[None, :], mask=inside, other=0.0)
        logits = tl.dot(keys, tl.trans(queries), input_precision="ieee")
        logits = logits * scale if cap is None else capped(logits, scale, cap)
        norm = tl.load(lse + query, mask=here, other=float("inf")).to(tl.float32)
        norm = tl.where(norm == -float("inf"), float("inf"), norm)
        part = tl.where(seen, tl.exp2((logits - norm[None, :]) * LOG2E) * share[None, :], 0.0)
        sums += tl.sum(part, 1)
    return sums


@triton.jit(do_not_specialize=COUNTS)
def block_sparse_received_kernel(
    q, k, lse, weight, out, tiles, columns, positions, lengths,
    tokens, first, last, tile_count, column_count, group, sets, scale, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, lse_batch, lse_head, weight_batch, out_batch, out_head,
    tile_batch, tile_set, tile_row, column_batch, column_set, column_row, order_batch, order_head,
    WIDTH: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SCAN: tl.constexpr,
    LINE: tl.constexpr, SPAN: tl.constexpr, SINK: tl.constexpr, LOCAL: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of keys, H, B).  LINE: queries that share a list."""
    place = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tl.arange(0, D)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // group * k_head
    inside = (place < tokens)[:, None] & (column < WIDTH)[None, :]
    keys = tl.load(k + place.to(tl.int64)[:, None] * k_row + column[None, :], mask=inside, other=0.0)
    position = tl.where(place < tokens, place, -1)
    if positions is not None:
        order = positions + batch * order_batch + head // group * order_head
        position = tl.load(order + place, mask=place < tokens, other=-1).to(tl.int32)
    end = tokens
    if lengths is not None:
        end = tl.minimum(tl.load(lengths + batch), tokens).to(tl.int32)
    lse += batch * lse_batch + head * lse_head
    if weight is not None:
        weight += batch * weight_batch
    owner = head * sets // tl.num_programs(1)
    if tiles is not None:
        tiles += batch * tile_batch + owner * tile_set
    if columns is not None:
        columns += batch * column_batch + owner * column_set
    begin = 0
    if CAUSAL:  # earlier rows see none of the keys
        begin = tl.min(tl.where(place < tokens, position, tokens), 0) // LINE
    sums = tl.zeros([KEYS], tl.float32)
    for row in range(begin, tl.cdiv(end, LINE)):
        listed = tl.zeros([KEYS], tl.int32)
        if tiles is not None:
            listed = named(listed, place, tiles + tl.cast(row, tl.int64) * tile_row, tile_count, SPAN, SCAN)
        if columns is not None:
            listed = named(listed, place, columns + tl.cast(row, tl.int64) * column_row, column_count, 1, SCAN)
        for start in range(row * LINE, row * LINE + LINE, ROWS):
            sums = given(
                sums, keys, listed, position, start, row * LINE + LINE, end, q, lse, weight, first, last, scale, cap,
                q_row, WIDTH, D, ROWS, SINK, LOCAL, CAUSAL, WINDOW,
            )  # fmt: skip
    tl.store(out + batch * out_batch + head * out_head + place, sums, mask=place < tokens)


def work(architecture: Architecture, q: Tensor, k: Tensor, lse: Tensor, weight: MaybeTensor, *arguments: Any) -> Work:
    """One launch."""
    index, scale, softcap = Pairs.of(*arguments)
    batch, heads, tokens, size = q.shape
    tensors = (q, k, lse, weight, index.tiles, index.columns, index.positions, index.lengths)
    q, k, lse, weight, tiles, columns, positions, lengths = (with_unit_columns(x) for x in tensors)
    out = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    named_arguments: dict[str, Any] = {
        **{"q": q, "k": k, "lse": lse, "weight": weight, "out": out},
        **{"tiles": tiles, "columns": columns, "positions": positions, "lengths": lengths},
        **{"tokens": tokens, "first": index.first, "last": index.last, "group": heads // k.shape[1]},
        **{"tile_count": 0 if tiles is None else tiles.shape[3]},
        **{"column_count": 0 if columns is None else columns.shape[3]},
        **{"sets": {"layer": 1, "kv": k.shape[1], "query": heads}[index.share], "scale": scale, "cap": softcap},
        **strides("q", q, "batch", "head", "row"),
        **strides("k", k, "batch", "head", "row"),
        **strides("lse", lse, "batch", "head"),
        **strides("weight", weight, "batch"),
        **strides("out", out, "batch", "head"),
        **strides("tile", tiles, "batch", "set", "row"),
        **strides("column", columns, "batch", "set", "row"),
        **strides("order", positions, "batch", "head"),
    }
    config = architecture.config("block_sparse_received_kernel", *keys_of(size, q))
    config = config.having(
        WIDTH=size, D=padded(size), LINE=index.rows, SPAN=index.width, SINK=index.sink, LOCAL=index.local,
        CAUSAL=index.causal, WINDOW=index.window,
    )  # fmt: skip
    grid = (triton.cdiv(tokens, config.constants["KEYS"]), heads, batch)
    return [Launch(block_sparse_received_kernel, grid, named_arguments, config)], out


def why_not(q: Tensor, k: Tensor, *_: Any) -> str:
    """Other number types and head sizes."""
    return attention_tiles.why_not(q, k)


def examples() -> Iterator[tuple[Any, ...]]:
    """Of block_sparse_attention's the one with tiles and columns, with a weight for each query."""
    for q, k, _, *index in islice(block_sparse_attention.examples(), 2, 3):
        lse, weight = (torch.empty(shape, device="meta") for shape in (q.shape[:3], (q.shape[0], q.shape[2])))
        yield q, k, lse, weight, *index


TWIN = Twin(work, examples, why_not)
