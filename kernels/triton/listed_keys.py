"""What the kernel of `block_sparse_attention` does with a program's keys, by the part of an index that names them.

A running maximum and sum join the parts (Milakov and Gimelshein 2018, arXiv 1805.02867).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import LN2, LOG2E, capped


@triton.jit
def meet(
    mix, total, top, queries, k, v, key, there, seen, scale, cap, k_row, v_row,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr,
):  # fmt: skip
    """Add keys [KEYS], those that are `there`, to the weighted values; `seen` [M, KEYS]: which query reads which."""
    column, value_column = tl.arange(0, D), tl.arange(0, VALUE_D)
    place = key.to(tl.int64)[:, None]
    tile = tl.load(k + place * k_row + column[None, :], mask=there[:, None] & (column < WIDTH)[None, :], other=0.0)
    logits = tl.dot(queries, tl.trans(tile), input_precision="ieee")
    logits = logits * scale if cap is None else capped(logits, scale, cap)
    logits = tl.where(seen, logits * LOG2E, -float("inf"))
    highest = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(highest == -float("inf"), 0.0, highest)  # a query that has read nothing yet has no maximum
    weights = tl.exp2(logits - shift[:, None])
    shrink = tl.exp2(top - shift)
    inside = there[:, None] & (value_column < VALUE_WIDTH)[None, :]
    values = tl.load(v + place * v_row + value_column[None, :], mask=inside, other=0.0)
    mix = tl.dot(weights.to(values.dtype), values, mix * shrink[:, None], input_precision="ieee")
    return mix, total * shrink + tl.sum(weights, 1), highest


@triton.jit
def over(
    mix, total, top, queries, query, bound, k, v, order, first, last, stop, scale, cap, k_row, v_row,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr,
    KEYS: tl.constexpr, SINK: tl.constexpr, LOCAL: tl.constexpr, PART: tl.constexpr, WINDOW: tl.constexpr = 0,
):  # fmt: skip
    """Add the keys first .. last - 1, of those before position `stop`; each query reads those up to its bound.

    With a WINDOW, only those less than so many tokens away.

    PART: "all" and "listed" (without sinks and nearest keys, which are read as such) count places in memory, `order`
    telling the position of each; "sink" and "near" (the nearest but sinks) count positions, `order` telling places.
    Where there is no order they are one.
    """
    for start in range(first, last, KEYS):
        at = start + tl.arange(0, KEYS)
        inside = at < last
        other = at if order is None else tl.load(order + at, mask=inside, other=0).to(tl.int32)
        by_place: tl.constexpr = PART == "all" or PART == "listed"
        place = at if by_place else other
        position = other if by_place else at
        there = inside & (position < stop)
        seen = there[None, :] & (position[None, :] <= bound[:, None])
        if PART == "listed" or PART == "near":
            near = tl.abs(query[:, None] - position[None, :]) < LOCAL
            seen = seen & (position >= SINK)[None, :] & (near if PART == "near" else (near == 0))
        if WINDOW > 0:
            seen = seen & (tl.abs(query[:, None] - position[None, :]) < WINDOW)
        mix, total, top = meet(
            mix, total, top, queries, k, v, place, there, seen, scale, cap, k_row, v_row,
            WIDTH, VALUE_WIDTH, D, VALUE_D,
        )  # fmt: skip
    return mix, total, top


@triton.jit
def over_columns(
    mix, total, top, queries, query, bound, k, v, positions, columns, count, tokens, stop, scale, cap, k_row, v_row,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr,
    KEYS: tl.constexpr, SINK: tl.constexpr, LOCAL: tl.constexpr, WINDOW: tl.constexpr = 0,
):  # fmt: skip
    """Add single keys, named by columns [count]."""
    for start in range(0, count, KEYS):
        slot = start + tl.arange(0, KEYS)
        place = tl.load(columns + slot, mask=slot < count, other=-1)
        held = (place >= 0) & (place < tokens)
        position = place if positions is None else tl.load(positions + place, mask=held, other=0).to(tl.int32)
        held = held & (position >= SINK) & (position < stop)
        far = tl.abs(query[:, None] - position[None, :]) >= LOCAL
        seen = held[None, :] & (position[None, :] <= bound[:, None]) & far
        if WINDOW > 0:
            seen = seen & (tl.abs(query[:, None] - position[None, :]) < WINDOW)
        mix, total, top = meet(
            mix, total, top, queries, k, v, place, held, seen, scale, cap, k_row, v_row, WIDTH, VALUE_WIDTH, D, VALUE_D
        )
    return mix, total, top


@triton.jit
def of_program(
    row, pack, batch, lengths, tokens, first, last,
    ROWS: tl.constexpr, PACK: tl.constexpr, M: tl.constexpr, CAUSAL: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Head and place of each query of a program [M], whether it is there, and the last position it reads, -1 for none.

    DENSE: rows are those of the first and last tokens.
    """
    member = tl.arange(0, M)
    query = row * ROWS + member % ROWS
    end = tokens
    if lengths is not None:
        end = tl.minimum(tl.load(lengths + batch), tokens).to(tl.int32)
    there = member < PACK * ROWS
    if DENSE:
        there = there & (query < first + last)
        query = tl.where(query < first, query, end - last + query - first)
    there = there & (query >= 0) & (query < (end if DENSE else tokens))
    bound = tl.where(there & (query < end), tl.minimum(query, end - 1) if CAUSAL else end - 1, -1)
    return (pack * PACK + member // ROWS).to(tl.int64), query, there, bound


@triton.jit
def wanted(q, head, query, there, q_head, q_row, WIDTH: tl.constexpr, D: tl.constexpr):
    """Load the queries of a program, [M, D]."""
    column = tl.arange(0, D)
    place = q + head[:, None] * q_head + query.to(tl.int64)[:, None] * q_row + column[None, :]
    return tl.load(place, mask=there[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def wrote(
    out, lse, mix, total, top, head, query, there, out_head, out_row, lse_head,
    VALUE_WIDTH: tl.constexpr, VALUE_D: tl.constexpr,
):  # fmt: skip
    """Store the means, zeros for a query that reads nothing, and the log-sum-exps, where they are wanted."""
    if lse is not None:
        tl.store(lse + head * lse_head + query, (top + tl.log2(total)) * LN2, mask=there)
    column = tl.arange(0, VALUE_D)
    mix = mix / tl.where(total == 0, 1.0, total)[:, None]
    place = out + head[:, None] * out_head + query.to(tl.int64)[:, None] * out_row + column[None, :]
    tl.store(place, mix.to(out.dtype.element_ty), mask=there[:, None] & (column < VALUE_WIDTH)[None, :])
