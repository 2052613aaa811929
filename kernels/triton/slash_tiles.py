"""The kernel of `slash_tiles`: one launch; a program walks for some rows at once, each step a short search.

A row's walk is a chain of tiles, each found from the one before it, so rows are what runs side by side.  From the tile
that ends at E - at, the next one ends at E - min(nearest, at - block), `nearest` being the largest distance below `at`:
that is the rule of the module of the op, and holds for the first tile too, from at = E.  Between two steps the walk
passes at most `block` distances, among which a few halvings find the place where it goes on; it ends with the longest
row of the program.  Columns then search the tiles of their row, which the program has just written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..slash_tiles import sizes
from .architecture import Architecture
from .attention_tiles import strides
from .launch import Launch, Twin, Work

COUNTS = ["tokens", "rows", "most", "slashes", "many"]
COUNTS += [f"{name}_{axis}" for name in ("distances", "columns") for axis in ("batch", "set")]


@triton.jit
def below(listed, stride, low, high, bound, span):
    """How many distances of an ascending list are below `bound`: from low to high, which are at most `span` apart."""
    left = tl.cast(span, tl.int32)
    while left > 0:
        middle = (low + high) // 2
        found = tl.load(listed + middle.to(tl.int64) * stride, mask=low < high, other=-1).to(tl.int32)
        less = (found >= 0) & (found < bound)
        low, high = tl.where(less, middle + 1, low), tl.where(less, high, middle)
        left = left // 2
    return low


@triton.jit(do_not_specialize=COUNTS)
def slash_tiles_kernel(
    distances, columns, tiles, single, tokens, rows, most, slashes, many,
    distances_batch, distances_set, distances_item, columns_batch, columns_set, columns_item,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of both results; grid (ceil(R / ROWS), S, B)."""
    one, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    end, own = (row + 1) * BLOCK, (batch * tl.num_programs(1) + one) * rows + row
    listed = distances + batch * distances_batch + one * distances_set
    wanted = columns + batch * columns_batch + one * columns_set
    line = tiles + own * most
    count = below(listed, distances_item, row * 0, row * 0 + slashes, tl.minimum(end, tokens), slashes)
    at, used, last, slot = end, row * 0, row * 0 - 1, 0
    left = (row < rows) & (count > 0)
    while tl.max(left.to(tl.int32), 0) > 0:
        place = listed + (count - 1).to(tl.int64) * distances_item
        at = tl.minimum(tl.load(place, mask=left, other=0).to(tl.int32), at - BLOCK)
        start = end - at - BLOCK
        left = left & (start < tokens)
        tl.store(line + slot, start, mask=left)
        used, last, slot = used + left.to(tl.int32), tl.where(left, start, last), slot + 1
        count = below(listed, distances_item, tl.maximum(count - BLOCK, 0), count - 1, at, BLOCK - 1)
        left = left & (count > 0)
    tl.debug_barrier()
    inside, far, of_row = (row < rows)[:, None], line[:, None], used[:, None]
    for first in range(0, most, COLUMNS):
        entry = first + tl.arange(0, COLUMNS)[None, :]
        tl.store(far + entry, tl.full([ROWS, COLUMNS], -1, tl.int32), mask=inside & (entry >= of_row) & (entry < most))
    widest = tl.max(used, 0)
    for first in range(0, many, COLUMNS):
        item = first + tl.arange(0, COLUMNS)
        key = tl.load(wanted + item.to(tl.int64) * columns_item, mask=item < many, other=-1).to(tl.int32)[None, :]
        low, high, span = tl.zeros([ROWS, COLUMNS], tl.int32), of_row + tl.zeros([ROWS, COLUMNS], tl.int32), widest
        while span > 0:
            middle = (low + high) // 2
            before = (low < high) & (tl.load(far + middle, mask=low < high, other=0) <= key)
            low, high, span = tl.where(before, middle + 1, low), tl.where(before, high, middle), span // 2
        holder = tl.load(far + low - 1, mask=low > 0, other=-BLOCK)
        alone = (key >= 0) & (key < last[:, None]) & (key >= holder + BLOCK)
        result = single + own[:, None] * many + item[None, :]
        tl.store(result, tl.where(alone, key, -1), mask=inside & (item < many)[None, :])


def work(architecture: Architecture, distances: Tensor, columns: Tensor, tokens: int, block: int) -> Work:
    """One launch."""
    (batch, scope, slashes), many = distances.shape, columns.shape[2]
    rows, most = sizes(slashes, tokens, block)
    results = tuple(distances.new_empty((batch, scope, rows, n), dtype=torch.int32) for n in (most, many))
    arguments: dict[str, Any] = {
        **{"distances": distances, "columns": columns, "tiles": results[0], "single": results[1]},
        **{"tokens": tokens, "rows": rows, "most": most, "slashes": slashes, "many": many},
        **strides("distances", distances, "batch", "set", "item"),
        **strides("columns", columns, "batch", "set", "item"),
    }
    config = architecture.config("slash_tiles_kernel").having(BLOCK=block)
    programs = triton.cdiv(rows, config.constants["ROWS"])
    return [Launch(slash_tiles_kernel, (programs, scope, batch), arguments, config)], results


def examples() -> Iterator[tuple[Any, ...]]:
    """MInference's defaults at 128k tokens; lists of key heads in a padded batch, where little is read."""
    for batch, heads, slashes, columns, tokens, block in [(1, 32, 6096, 1000, 131072, 64), (4, 8, 100, 30, 8192, 128)]:
        lists = (torch.empty(batch, heads, n, dtype=torch.int64, device="meta") for n in (slashes, columns))
        yield *lists, tokens, block


TWIN = Twin(work, examples)
