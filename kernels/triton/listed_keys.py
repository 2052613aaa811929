"""What the kernel of `block_sparse_attention` does with a program's keys, by the part of an index that names them.

A running maximum and sum join the parts (Milakov and Gimelshein 2018, arXiv 1805.02867).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import LN2, LOG2E, capped


@triton.jit
def loaded(place, there, column, WIDTH: tl.constexpr, D: tl.constexpr):
    """Rows [KEYS, D] of the memory at `place`, zeros where a row is not there and beyond WIDTH columns."""
    if there is not None:
        tile = tl.load(place, mask=there[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif WIDTH != D:
        tile = tl.load(place, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(place)
    return tile


@triton.jit
def meet(
    mix, total, top, queries, k, v, key, there, seen, scale, cap, k_row, v_row,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr,
):  # fmt: skip
    """Add keys [KEYS], those that are `there`, to the weighted values; `seen` [M, KEYS]: which query reads which.

    Where `there` and `seen` are None all are there, and every query reads all.
    """
    column, value_column = tl.arange(0, D), tl.arange(0, VALUE_D)
    place = key.to(tl.int64)[:, None]
    tile = loaded(k + place * k_row + column[None, :], there, column, WIDTH, D)
    logits = tl.dot(queries, tl.trans(tile), input_precision="ieee")
    logits = logits * scale if cap is None else capped(logits, scale, cap)
    logits = logits * LOG2E
    if seen is not None:
        logits = tl.where(seen, logits, -float("inf"))
    highest = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(highest == -float("inf"), 0.0, highest)  # a query that has read nothing yet has no maximum
    weights = tl.exp2(logits - shift[:, None])
    shrink = tl.exp2(top - shift)
    values = loaded(v + place * v_row + value_column[None, :], there, value_column, VALUE_WIDTH, VALUE_D)
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
def over_tiles(
    mix, total, top, queries, query, there, bound, k, v, positions, tiles, count, within, stop, scale, cap,
    k_row, v_row, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr,
    KEYS: tl.constexpr, SPAN: tl.constexpr, SINK: tl.constexpr, LOCAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Add the tiles of SPAN keys that begin at tiles [count]: first those that every query reads whole, unmasked."""
    WHOLE: tl.constexpr = positions is None and SPAN % KEYS == 0
    earliest = tl.min(tl.where(there, query, 0x7FFFFFFF), 0)
    reached = tl.min(tl.where(there, bound, 0x7FFFFFFF), 0)  # every query reads what is listed from `held` up to here
    held = SINK
    if LOCAL > 0:
        reached = tl.minimum(reached, earliest - LOCAL)
    if WINDOW > 0:
        reached = tl.minimum(reached, earliest + (WINDOW - 1))
        held = tl.maximum(tl.max(tl.where(there, query, 0), 0) - (WINDOW - 1), SINK)
    if WHOLE:
        for slot in range(0, count):
            begin = tl.load(tiles + slot)
            if begin >= held and begin + SPAN <= reached + 1:
                for start in range(begin, begin + SPAN, KEYS):
                    mix, total, top = meet(
                        mix, total, top, queries, k, v, start + tl.arange(0, KEYS), None, None, scale, cap,
                        k_row, v_row, WIDTH, VALUE_WIDTH, D, VALUE_D,
                    )  # fmt: skip
    for slot in range(0, count):
        begin = tl.load(tiles + slot)
        left = begin >= 0
        if WHOLE:
            left = left & ((begin < held) | (begin + SPAN > reached + 1))
        if left:
            mix, total, top = over(
                mix, total, top, queries, query, bound, k, v, positions, begin, tl.minimum(begin + SPAN, within),
                stop, scale, cap, k_row, v_row, WIDTH, VALUE_WIDTH, D, VALUE_D, KEYS, SINK, LOCAL, "listed", WINDOW,
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
    row, pack, end, tokens, first, last,
    ROWS: tl.constexpr, PACK: tl.constexpr, M: tl.constexpr, CAUSAL: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Head and place of each query of a program [M], whether it is there, and the last position it reads, -1 for none.

    end: real tokens.  DENSE: rows are those of the first and last tokens.
    """
    member = tl.arange(0, M)
    query = row * ROWS + member % ROWS
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
