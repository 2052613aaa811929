"""The kernel of `block_sparse_attention`: a fixed number of programs, each for some rows of queries, one after another.

A row goes over the keys that its lists name.  Where several query heads share a list, a program takes as many of them
as fit, so that what it loads serves them all.  The sinks come first, then the row's tiles, those that all its queries
read whole before the others and without a mask, its columns, gathered one by one, and the nearest keys; a running
maximum and sum join them (Milakov and Gimelshein 2018, arXiv 1805.02867).  Rows that read most start first: those with
the longest lists, or the last, which read most where attention is causal.  Tokens that read everything are a second
launch over the same output.
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
from .listed_keys import of_program, over, over_columns, over_tiles, wanted, wrote

MOST = 128  # queries of a program
PROGRAMS = 1024  # more than run at once on any of the targets, so that what each has to do evens out
ORDERED = 128  # rows of a list from which sorting them by length is worth its own launches
COUNTS = ["tokens", "first", "last", "tile_count", "column_count", "tile_row", "column_row"]
COUNTS += ["position_batch", "position_head", "lse_batch", "lse_head", "items", "count", "packs"]


@triton.jit(do_not_specialize=COUNTS)
def block_sparse_kernel(
    q, k, v, out, lse, tiles, columns, positions, places, lengths, order,
    tokens, first, last, tile_count, column_count, group, sets, scale, cap, items, count, packs,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, lse_batch, lse_head,
    tile_batch, tile_set, tile_row, column_batch, column_set, column_row, position_batch, position_head,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr,
    ROWS: tl.constexpr, PACK: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr,
    SINK: tl.constexpr, LOCAL: tl.constexpr, CAUSAL: tl.constexpr, DENSE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Any number of programs; items are `count` rows of `packs` = H / PACK packs of heads of each batch row.

    order [B, sets, count]: rows of a list, longest first; None: last first.  SPAN: keys of a tile. DENSE: of_program.
    """
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        row, pack, batch = count - 1 - item % count, item // count % packs, (item // count // packs).to(tl.int64)
        owner = pack * sets // packs
        if order is not None:
            row = tl.load(order + (batch * sets + owner) * count + item % count)
        end = tokens  # loaded here: see `selection` on what Inductor takes for written
        if lengths is not None:
            end = tl.minimum(tl.load(lengths + batch), tokens).to(tl.int32)
        head, query, there, bound = of_program(row, pack, end, tokens, first, last, ROWS, PACK, M, CAUSAL, DENSE)
        queries = wanted(q + batch * q_batch, head, query, there, q_head, q_row, WIDTH, D)
        shared = (pack * PACK // group).to(tl.int64)
        keys, values = k + batch * k_batch + shared * k_head, v + batch * v_batch + shared * v_head
        by_place = None if positions is None else positions + batch * position_batch + shared * position_head
        by_token = None if places is None else places + batch * position_batch + shared * position_head
        top = tl.full([M], -float("inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        mix = tl.zeros([M, VALUE_D], tl.float32)
        stop = tl.max(bound, 0) + 1
        within = stop if positions is None else tl.minimum(stop, 1) * tokens  # behind the last place to read, if any
        if DENSE or SINK > 0:
            mix, total, top = over(
                mix, total, top, queries, query, bound, keys, values, by_place if DENSE else by_token, 0,
                within if DENSE else tl.minimum(stop, SINK), stop, scale, cap, k_row, v_row,
                WIDTH, VALUE_WIDTH, D, VALUE_D, KEYS, SINK, LOCAL, "all" if DENSE else "sink", WINDOW,
            )  # fmt: skip
        if tiles is not None and not DENSE:
            line = tiles + batch * tile_batch + owner * tile_set + tl.cast(row, tl.int64) * tile_row
            mix, total, top = over_tiles(
                mix, total, top, queries, query, there, bound, keys, values, by_place, line, tile_count, within, stop,
                scale, cap, k_row, v_row, WIDTH, VALUE_WIDTH, D, VALUE_D, KEYS, SPAN, SINK, LOCAL, WINDOW,
            )  # fmt: skip
        if columns is not None and not DENSE:
            line = columns + batch * column_batch + owner * column_set + tl.cast(row, tl.int64) * column_row
            mix, total, top = over_columns(
                mix, total, top, queries, query, bound, keys, values, by_place, line, column_count, tokens, stop,
                scale, cap, k_row, v_row, WIDTH, VALUE_WIDTH, D, VALUE_D, KEYS, SINK, LOCAL, WINDOW,
            )  # fmt: skip
        if LOCAL > 0 and not DENSE:
            begin, after = tl.maximum(row * ROWS - LOCAL + 1, 0), tl.minimum(row * ROWS + ROWS + LOCAL, stop)
            mix, total, top = over(
                mix, total, top, queries, query, bound, keys, values, by_token, begin, after, stop, scale, cap,
                k_row, v_row, WIDTH, VALUE_WIDTH, D, VALUE_D, KEYS, SINK, LOCAL, "near", WINDOW,
            )  # fmt: skip
        sums, here = None if lse is None else lse + batch * lse_batch, out + batch * out_batch
        wrote(here, sums, mix, total, top, head, query, there, out_head, out_row, lse_head, VALUE_WIDTH, VALUE_D)


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
    sets = {"layer": 1, "kv": k.shape[1], "query": heads}[index.share]
    rows = triton.cdiv(tokens, index.rows)
    arguments: dict[str, Any] = {
        **{"q": q, "k": k, "v": v, "out": out, "lse": sums, "tiles": tiles, "columns": columns, "lengths": lengths},
        **{"positions": positions, "places": _places(positions) if index.sink or index.local else None},
        **{"tokens": tokens, "first": index.first, "last": index.last, "group": heads // k.shape[1]},
        **{"tile_count": 0 if tiles is None else tiles.shape[3]},
        **{"column_count": 0 if columns is None else columns.shape[3]},
        **{"sets": sets, "scale": scale, "cap": softcap},
        **strides("q", q, "batch", "head", "row"),
        **strides("k", k, "batch", "head", "row"),
        **strides("v", v, "batch", "head", "row"),
        **strides("out", out, "batch", "head", "row"),
        **strides("lse", sums, "batch", "head"),
        **strides("tile", tiles, "batch", "set", "row"),
        **strides("column", columns, "batch", "set", "row"),
        **strides("position", positions, "batch", "head"),
    }
    kind = "" if positions is None and not lse else "extra"  # which takes registers
    config = architecture.config("block_sparse_kernel", *keys_of(max(size, v.shape[3]), q, kind))
    widths = {"WIDTH": size, "VALUE_WIDTH": v.shape[3], "D": padded(size), "VALUE_D": padded(v.shape[3])}
    launches, order = [], _longest_first(tiles, columns, index.width, batch, sets, rows)
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
        many, packs = triton.cdiv(index.first + index.last, index.rows) if dense else rows, heads // pack
        items = {"items": many * packs * batch, "count": many, "packs": packs, "order": None if dense else order}
        programs = min(PROGRAMS, items["items"]) if isinstance(items["items"], int) else PROGRAMS
        launches.append(
            Launch(block_sparse_kernel, (programs,), {**arguments, **items}, config.having(**widths, **constants))
        )
    return launches, out, sums


def work(architecture: Architecture, q: Tensor, k: Tensor, v: Tensor, *index: Any) -> Work:
    """See `launched`."""
    launches, out, _ = launched(architecture, q, k, v, *Pairs.of(*index), lse=False)
    return launches, out


def _longest_first(
    tiles: MaybeTensor, columns: MaybeTensor, width: int, batch: Any, sets: int, rows: Any
) -> MaybeTensor:
    """[B, sets, rows] int32: the rows of each list by how many keys it names; None for few rows, and without lists."""
    named = [(x >= 0).sum(3) * keys for x, keys in ((tiles, width), (columns, 1)) if x is not None]
    if not named or (isinstance(rows, int) and rows < ORDERED):
        return None
    keys = named[0] if len(named) == 1 else named[0] + named[1]
    return keys.expand(batch, sets, rows).argsort(dim=2, descending=True, stable=True).to(torch.int32).contiguous()


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
