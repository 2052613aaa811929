"""The kernel behind merge_tokens, reduce_tokens and add_reduce_norm: one program makes the row of one slot.

It reads the row of the slot's leader and those of the tokens that moved there, each once, and writes each result once.
The moved tokens of a slot are found by looking at the slot of every moved token, a tile at a time; they are added in
ascending order, without atomics.  A row is held by few warps, so that a program has enough loads on their way and sums
over a row need few or no steps between warps.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture
from .launch import Launch

WIDEST = 8192  # features that one program holds in registers
NORMS = {"": 0, "layer": 1, "rms": 2}


@triton.jit
def _normalised(row, gamma, beta, width, eps, column, inside, NORM: tl.constexpr):
    """LayerNorm (NORM 1) or RMSNorm (2) of a row whose columns outside are 0, and stay so."""
    if NORM == 1:
        row = tl.where(inside, row - tl.sum(row, 0) / width, 0.0)
    row *= tl.rsqrt(tl.sum(row * row, 0) / width + eps)
    if gamma is not None:
        row *= tl.load(gamma + column, mask=inside, other=0.0).to(tl.float32)
    if beta is not None:
        row += tl.load(beta + column, mask=inside, other=0.0).to(tl.float32)
    return row


@triton.jit
def _row(x, added, scale, gamma, beta, token, width, eps, column, inside, FIRST: tl.constexpr):
    """x + scale * added of one token, normalised where FIRST names a norm, float32."""
    value = tl.load(x + token * width + column, mask=inside, other=0.0).to(tl.float32)
    if added is not None:
        extra = tl.load(added + token * width + column, mask=inside, other=0.0).to(tl.float32)
        if scale is not None:
            extra *= tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
        value += extra
    if FIRST > 0:
        value = _normalised(value, gamma, beta, width, eps, column, inside, FIRST)
    return value


@triton.jit
def _share(weight, token):
    """What a token weighs."""
    share = 1.0
    if weight is not None:
        share = tl.load(weight + token)
    return share


@triton.jit
def _arrivals(slot, moved, own, lead, start, entries, SCAN: tl.constexpr):
    """Of a tile of moved tokens: their places in the list, which they are, and which of them are in the slot `own`."""
    place = start + tl.arange(0, SCAN)
    token = tl.load(moved + place, mask=place < entries, other=0)
    goal = tl.load(slot + token, mask=place < entries, other=-1)
    return place, token, (goal == own) & (token != lead)


@triton.jit
def _weighed(slot, moved, weight, own, lead, entries, SCAN: tl.constexpr):
    """How many tokens moved to a slot, and what it weighs with them."""
    together, found = _share(weight, lead), 0
    for start in range(0, entries, SCAN):
        _, token, here = _arrivals(slot, moved, own, lead, start, entries, SCAN)
        found += tl.sum(here.to(tl.int32), 0)
        part = tl.where(here, 1.0, 0.0)
        if weight is not None:
            part = tl.load(weight + token, mask=here, other=0.0)
        together += tl.sum(part, 0)
    return found, together


@triton.jit
def _joined(total, led, together, x, added, scale, gamma, beta, slot, moved, weight, own, lead, entries, width, eps,
            column, inside, MEAN: tl.constexpr, FIRST: tl.constexpr, SCAN: tl.constexpr):  # fmt: skip
    """The row of a slot with the tokens that moved there, in ascending order."""
    for start in range(0, entries, SCAN):
        place, _, here = _arrivals(slot, moved, own, lead, start, entries, SCAN)
        last = start - 1
        for _ in range(tl.sum(here.to(tl.int32), 0)):
            last = tl.min(tl.where(here & (place > last), place, entries), 0)
            token = tl.load(moved + last)
            row = _row(x, added, scale, gamma, beta, token, width, eps, column, inside, FIRST)
            if MEAN:
                total += (row - led) * (_share(weight, token) / together)
            else:
                total += row * _share(weight, token)
    return total


@triton.jit
def reduce_kernel(x, added, scale, slot, leader, moved, weight, valid, gamma, beta, y, normed, mass, log_mass,
                  tokens, slots, entries, width, eps, MEAN: tl.constexpr, FIRST: tl.constexpr, NORM: tl.constexpr,
                  TILE: tl.constexpr, SCAN: tl.constexpr):  # fmt: skip
    """One slot and one tile of features; grid (batch * slots, tiles).  See `reduce_launch` for the arguments.

    All tensors are contiguous: an offset that is a multiple of the width tells the compiler how loads are aligned.
    """
    number = tl.program_id(0)
    own = number % slots
    first = (number // slots).to(tl.int64) * tokens
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    x += first * width
    if added is not None:
        added += first * width
    lead = tl.load(leader + number)
    led = _row(x, added, scale, gamma, beta, lead, width, eps, column, inside, FIRST)
    total = led
    if moved is not None:
        moved += (number // slots).to(tl.int64) * entries
        slot += first
        if weight is not None:
            weight += first
        found, together = _weighed(slot, moved, weight, own, lead, entries, SCAN)
        if not MEAN:
            total *= _share(weight, lead)
        if found > 0:
            total = _joined(total, led, together, x, added, scale, gamma, beta, slot, moved, weight, own, lead,
                            entries, width, eps, column, inside, MEAN, FIRST, SCAN)  # fmt: skip
        if mass is not None and tl.program_id(1) == 0:
            if valid is not None:
                together = tl.where(tl.load(valid + number), together, 0.0)
            tl.store(mass + number, together)
            if log_mass is not None:
                tl.store(log_mass + number, tl.log(together))
    out = number.to(tl.int64) * width + column
    tl.store(y + out, total, mask=inside)
    if NORM > 0:
        row = _normalised(total, gamma, beta, width, eps, column, inside, NORM)
        tl.store(normed + out, row, mask=inside)


def why_not(x: Tensor, *_: Any) -> str:
    """It computes in float32, which neither float64 nor integers fit in; a number of features must be known to tile."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, and the tokens are {str(x.dtype).removeprefix('torch.')}"
    return "" if isinstance(x.shape[2], int) else "the number of features is not known"


def reduce_launch(
    architecture: Architecture,
    x: Tensor,
    slot: Tensor,
    leader: Tensor,
    moved: Tensor | None,
    weight: Tensor | None,
    results: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    *,
    mean: bool,
    added: Tensor | None = None,
    scale: Tensor | None = None,
    valid: Tensor | None = None,
    norm: str = "",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    norm_first: bool = False,
) -> Launch:
    """One launch that fills `results`: y [B, N', C], normed as y, mass and log mass [B, N'] float32; None: not wanted.

    Arguments as those of add_reduce_norm; features that are not contiguous are copied first.
    """
    (batch, tokens, width), slots = x.shape, leader.shape[1]
    tile = min(triton.next_power_of_2(width), WIDEST)
    assert tile >= width or not norm
    tensors = {
        **{"x": x, "added": added, "scale": scale, "slot": slot, "leader": leader, "moved": moved, "weight": weight},
        **{"valid": valid, "gamma": norm_weight, "beta": norm_bias},
    }
    arguments: dict[str, Any] = {
        **{name: one if one is None else one.contiguous() for name, one in tensors.items()},
        **dict(zip(("y", "normed", "mass", "log_mass"), results, strict=True)),
        **{"tokens": tokens, "slots": slots, "entries": 0 if moved is None else moved.shape[1], "width": width},
        "eps": float(eps),
    }
    before, after = (NORMS[norm], 0) if norm_first else (0, NORMS[norm])
    config = architecture.config("reduce_kernel", f"t{tile}").having(MEAN=mean, FIRST=before, NORM=after, TILE=tile)
    return Launch(reduce_kernel, (batch * slots, triton.cdiv(width, tile)), arguments, config)


def example_plan(batch: int, tokens: int, slots: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, slot, leader, moved and weight on the meta device."""
    index = [torch.empty(batch, n, dtype=torch.int64, device="meta") for n in (tokens, slots, tokens - slots)]
    x = torch.empty(batch, tokens, width, dtype=dtype, device="meta")
    return x, *index, torch.empty(batch, tokens, device="meta")
