"""What the kernels of attention share: tiles of rows, logits in base 2, and the arguments that say where tensors lie.

Logits are kept times log2(e), so that a probability is one `exp2`; the bias per key is brought to that unit when it is
added.  Under a float mask they stay in their own unit: masks hide by the lowest number of a type, which log2(e) would
make infinite.  So do logits whose log-sum-exp is given: the difference of two numbers that nearly cancel must not see
their product with log2(e) rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

MaybeTensor = Tensor | None
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
WIDEST = 128  # head size whose tiles fit


@triton.jit
def load_rows(
    base, first, count, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """[ROWS, D] from row `first` on; zeros beyond WIDTH columns and, where EDGE says they may be met, `count` rows.

    UNIT divides the stride: what may be read at once.
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, D)
    start = tl.multiple_of(tl.cast(first, tl.int64) * stride, UNIT)
    place = base + start + tl.multiple_of(row * stride, UNIT)[:, None] + column[None, :]
    inside = (first + row < count)[:, None]
    if EDGE and WIDTH != D:
        tile = tl.load(place, mask=inside & (column < WIDTH)[None, :], other=0.0)
    elif EDGE:
        tile = tl.load(place, mask=inside, other=0.0)
    elif WIDTH != D:
        tile = tl.load(place, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(place)
    return tile


@triton.jit
def capped(logits, scale, cap):
    """scale * logits under a soft cap: cap * tanh(scale * logits / cap).  tanh by exp2: interpreters have no other."""
    ratio = logits * (scale / cap)
    falling = tl.exp2(tl.abs(ratio) * (-2.0 * LOG2E))
    bound = (1.0 - falling) / (1.0 + falling)
    return tl.where(ratio < 0, -bound, bound) * cap


@triton.jit
def masked(logits, mask, row, column, rows, columns, mask_row, mask_column):
    """Logits with a tile of a mask applied: bool (true: seen) or float (added).

    mask points to the tile's first row; row, column: of the tile's elements, rows counted from that one.
    """
    # a mask may be a view whose rows lie so far apart that 32 bits overflow
    place = mask + row.to(tl.int64) * mask_row + column.to(tl.int64) * mask_column
    inside = (row < rows) & (column < columns)
    if mask.dtype.element_ty == tl.int1:
        logits = tl.where(tl.load(place, mask=inside, other=0), logits, -float("inf"))
    else:
        logits += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    return logits


def why_not(q: Tensor, k: Tensor, *values: Tensor) -> str:
    """Why kernels do not serve queries and keys (and values) of these types, head sizes and batches; "" when they do.

    Sizes that are symbols are not asked: the answer must hold for every value of theirs.
    """
    kinds = {one.dtype for one in (q, k, *values)}
    if len(kinds) > 1 or kinds - {torch.float16, torch.bfloat16, torch.float32}:
        return f"kernels take one of float16, bfloat16, float32, not {', '.join(sorted(map(str, kinds)))}"
    widths = [one.shape[3] for one in (q, *values)]
    if any(not isinstance(width, int) or not 0 < width <= WIDEST for width in widths):
        return f"kernels take head sizes up to {WIDEST}, not {', '.join(map(str, widths))}"
    batches = {one.shape[0] for one in (q, k, *values) if isinstance(one.shape[0], int)}
    if len(batches) > 1:
        return f"kernels take queries, keys and values of one batch, not batch sizes {str(sorted(batches))[1:-1]}"
    return ""


def padded(width: int) -> int:
    """The head size of a tile: a power of two, and at least what tensor cores multiply."""
    return max(16, triton.next_power_of_2(width))


def keys_of(width: int, x: Tensor, kind: str = "") -> list[str]:
    """Under which block sizes are found: padded head size and bits of an element, such as "d64-16"; then the bits."""
    bits = 8 * x.element_size()
    size = f"d{padded(width)}-{bits}"
    return [*([f"{kind}-{size}"] if kind else []), size, f"{bits}-bit"]


def unit_of(*tensors: MaybeTensor) -> int:
    """How many elements can be read at once, up to 16 bytes: what divides all strides between rows, whatever the sizes.

    Triton finds 16 by itself where strides are ints; a head of 72 lies at multiples of 8.
    """
    given = [x for x in tensors if x is not None]
    unit = 16 // given[0].element_size()
    return unit if all(statically_known_true(n % unit == 0) for x in given for n in x.stride()[:3]) else 1


def with_unit_columns(x: MaybeTensor) -> Any:
    """x, copied if the elements of its last axis are not side by side."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def strides(name: str, x: MaybeTensor, *axes: str) -> dict[str, Any]:
    """Arguments NAME_AXIS for the leading axes of a tensor; 0 where there is no tensor."""
    return {f"{name}_{axis}": 0 if x is None else x.stride(i) for i, axis in enumerate(axes)}


def mask_arguments(mask: MaybeTensor, batch: Any, heads: Any, rows: Any, columns: Any) -> dict[str, Any]:
    """A mask broadcast to [B, H, N, M] without a copy, and its strides."""
    whole = None if mask is None else mask.expand(batch, heads, rows, columns)
    return {"mask": whole, **strides("mask", whole, "batch", "head", "row", "column")}
