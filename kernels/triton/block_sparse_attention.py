"""The kernel of `block_sparse_attention`: one program per row of queries goes over the keys that its lists name.

Where several query heads share a list, a program takes as many of them as fit, so that what it loads serves them all.
The sinks come first, then the row's tiles, its columns, gathered one by one, and the nearest keys; a running maximum
and sum join them (Milakov and Gimelshein 2018, arXiv 1805.02867).  Rows at the end, which read most where attention is
causal, start first.  Tokens that read everything are a second launch over the same output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sparse_pairs import Pairs
from .architecture import Architecture
from .attention_tiles import (
    WIDEST,
    MaybeTensor,
    keys_of,
    padded,
    strides,
    why_not,
    with_unit_columns,
)
from .launch import Launch, Twin, Work
from .listed_keys import of_program, over, over_columns, wanted, wrote

MOST = 128  # queries of a program
COUNTS = ["tokens", "first", "last", "tile_count", "column_count", "tile_row", "column_row"]
COUNTS += ["order_batch", "order_head", "lse_batch", "lse_head"]


@triton.jit(do_not_specialize=COUNTS)
def block_sparse_kernel(
    q, k, v, out, lse, tiles, columns, positions, places, lengths,
    tokens, first, last, tile_count, column_count, group, sets, scale, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, lse_batch, lse_head,
    tile_batch, tile_set, tile_row, column_batch, column_set, column_row, order_batch, order_head,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr,
    ROWS: tl.constexpr, PACK: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr,
    SINK: tl.constexpr, LOCAL: tl.constexpr, CAUSAL: tl.constexpr, DENSE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid (rows, H / PACK, B).  SPAN: keys of a tile.  DENSE: rows are the first and last tokens, and read all."""
    row, pack, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.num_programs(0) - 1 - row
    head, query, there, bound = of_program(row, pack, batch, lengths, tokens, first, last, ROWS, PACK, M, CAUSAL, DENSE)
    queries = wanted(q + batch * q_batch, head, query, there, q_head, q_row, WIDTH, D)
    shared = (pack * PACK // group).to(tl.int64)
    k += batch * k_batch + shared * k_head
    v += batch * v_batch + shared * v_head
    if positions is not None:
        positions += batch * order_batch + shared * order_head
    if places is not None:
        places += batch * order_batch + shared * order_head
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mix = tl.zeros([M, VALUE_D], tl.float32)
    stop = tl.max(bound, 0) + 1
    within = stop if positions is None else tl.minimum(stop, 1) * tokens  # behind the last place to read, if any
    if DENSE or SINK > 0:
        mix, total, top = over(
            mix, total, top, queries, query, bound, k, v, positions if DENSE else places, 0,
            within if DENSE else tl.minimum(stop, SINK), stop, scale, cap, k_row, v_row,
            WIDTH, VALUE_WIDTH, D, VALUE_D, KEYS, SINK, LOCAL, "all" if DENSE else "sink", WINDOW,
        )  # fmt: skip
    owner = pack * sets // tl.num_programs(1)
    if tiles is not None and not DENSE:
        tiles += batch * tile_batch + owner * tile_set + tl.cast(row, tl.int64) * tile_row
        for slot in range(0, tile_count):
            begin = tl.load(tiles + slot)
            if begin >= 0:
                mix, total, top = over(
                    mix, total, top, queries, query, bound, k, v, positions, begin, tl.minimum(begin + SPAN, within),
                    stop, scale, cap, k_row, v_row, WIDTH, VALUE_WIDTH, D, VALUE_D, KEYS, SINK, LOCAL, "listed", WINDOW,
                )  # fmt: skip
    if columns is not None and not DENSE:
        columns += batch * column_batch + owner * column_set + tl.cast(row, tl.int64) * column_row
        mix, total, top = over_columns(
            mix, total, top, queries, query, bound, k, v, positions, columns, column_count, tokens, stop, scale, cap,
            k_row, v_row, WIDTH, VALUE_WIDTH, D, VALUE_D, KEYS, SINK, LOCAL, WINDOW,
        )  # fmt: skip
    if LOCAL > 0 and not DENSE:
        begin, after = tl.maximum(row * ROWS - LOCAL + 1, 0), tl.minimum(row * ROWS + ROWS + LOCAL, stop)
        mix, total, top = over(
            mix, total, top, queries, query, bound, k, v, places, begin, after, stop, scale, cap, k_row, v_row,
            WIDTH, VALUE_WIDTH, D, VALUE_D, KEYS, SINK, LOCAL, "near", WINDOW,
        )  # fmt: skip
    out += batch * out_batch
    if lse is not None:
        lse += batch * lse_batch
    wrote(out, lse, mix, total, top, head, query, there, out_head, out_row, lse_head, VALUE_WIDTH, VALUE_D)


def launched(
    architecture: Architecture,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Pairs,
    scale: float,
    softcap: float | None,
    *,
    lse: bool,
) -> tuple[list[Launch], Tensor, MaybeTensor]:
    """One launch, and one for the tokens that read everything; what they fill: attention, and log-sum-exp if asked."""
    batch, heads, tokens, size = q.shape
    given = (q, k, v, index.tiles, index.columns, index.positions, index.lengths)
    q, k, v, tiles, columns, positions, lengths = (with_unit_columns(x) for x in given)
    out = q.new_empty((batch, tokens, heads, v.shape[3])).transpose(1, 2)
    sums = q.new_empty((batch, heads, tokens), dtype=torch.float32) if lse else None
    arguments: dict[str, Any] = {
        **{"q": q, "k": k, "v": v, "out": out, "lse": sums, "tiles": tiles, "columns": columns, "lengths": lengths},
        **{"positions": positions, "places": _places(positions) if index.sink or index.local else None},
        **{"tokens": tokens, "first": index.first, "last": index.last, "group": heads // k.shape[1]},
        **{"tile_count": 0 if tiles is None else tiles.shape[3]},
        **{"column_count": 0 if columns is None else columns.shape[3]},
        **{"sets": {"layer": 1, "kv": k.shape[1], "query": heads}[index.share], "scale": scale, "cap": softcap},
        **strides("q", q, "batch", "head", "row"),
        **strides("k", k, "batch", "head", "row"),
        **strides("v", v, "batch", "head", "row"),
        **strides("out", out, "batch", "head", "row"),
        **strides("lse", sums, "batch", "head"),
        **strides("tile", tiles, "batch", "set", "row"),
        **strides("column", columns, "batch", "set", "row"),
        **strides("order", positions, "batch", "head"),
    }
    kind = "" if positions is None and not lse else "extra"  # which takes registers
    config = architecture.config("block_sparse_kernel", *keys_of(max(size, v.shape[3]), q, kind))
    widths = {"WIDTH": size, "VALUE_WIDTH": v.shape[3], "D": padded(size), "VALUE_D": padded(v.shape[3])}
    launches = []
    for dense in (False, True):
        if dense and not index.first + index.last:
            continue
        most = MOST // 2 if q.element_size() == 4 else MOST
        pack = 1 if index.share == "query" else _pack(heads // k.shape[1], index.rows, most)
        constants = {
            **{"ROWS": index.rows, "PACK": pack, "M": max(16, triton.next_power_of_2(pack * index.rows))},
            **{"SPAN": index.width, "SINK": index.sink, "LOCAL": index.local, "CAUSAL": index.causal, "DENSE": dense},
            "WINDOW": index.window,
        }
        many = triton.cdiv(index.first + index.last if dense else tokens, index.rows)
        launches.append(
            Launch(block_sparse_kernel, (many, heads // pack, batch), arguments, config.having(**widths, **constants))
        )
    return launches, out, sums


def work(architecture: Architecture, q: Tensor, k: Tensor, v: Tensor, *index: Any) -> Work:
    """See `launched`."""
    launches, out, _ = launched(architecture, q, k, v, *Pairs.of(*index), lse=False)
    return launches, out


def _places(positions: MaybeTensor) -> MaybeTensor:
    """Where in memory the key of each position lies, laid out as the positions."""
    if positions is None:
        return None
    places = torch.empty_strided(positions.shape, positions.stride(), dtype=positions.dtype, device=positions.device)
    at = torch.arange(positions.shape[2], dtype=positions.dtype, device=positions.device)
    return places.scatter_(2, positions.to(torch.int64), at.expand(positions.shape))


def _pack(group: int, rows: int, most: int) -> int:
    """Query heads of a group that one program takes: the most that divide it and fit."""
    return max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * rows <= most))


def refuses(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str:
    """Other number types and head sizes, and rows of too many queries: half as many in float32, and half as wide."""
    rows, wide = rest[5], q.element_size() == 4
    most, width = (MOST // 2, WIDEST // 2) if wide else (MOST, WIDEST)
    if reason := why_not(q, k, v):
        return reason
    if max(q.shape[3], v.shape[3]) > width:
        return f"in float32 the kernel takes head sizes up to {width}, not {max(q.shape[3], v.shape[3])}"
    return "" if rows <= most else f"the kernel takes rows of up to {most} queries of {q.dtype}, not {rows}"


def examples() -> Iterator[tuple[Any, ...]]:
    """A Llama's prompt: tiles of a group, over permuted keys, tiles and columns of each head, a window; float32."""
    q, k = (torch.empty(1, heads, 8192, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    tiles, ends = torch.empty(1, 8, 64, 16, dtype=torch.int32, device="meta"), torch.empty(1, device="meta").long()
    order = torch.empty(1, 8, 8192, dtype=torch.int32, device="meta")
    yield q, k, k, tiles, None, None, None, "kv", 128, 128, 0, 0, 0, 0, 0.1, True
    yield q, k, k, tiles, None, order, ends, "kv", 128, 128, 4, 0, 0, 0, 0.1, True
    listed, single = (torch.empty(1, 32, 128, n, dtype=torch.int32, device="meta") for n in (40, 1000))
    yield q, k, k, listed, single, None, ends, "query", 64, 64, 0, 0, 0, 0, 0.1, True
    small = torch.empty(2, 8, 4096, 64, dtype=torch.float32, device="meta")
    yield small, small, small, None, None, None, None, "layer", 64, 1, 4, 1024, 0, 64, 0.1, True


TWIN = Twin(work, examples, refuses, required=True)
