"""The kernel of `restore_tokens`: every original token reads its slot; one program per tile of a token's features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture
from .launch import Launch, Twin, Work


@triton.jit
def restore_kernel(y, source, out, width, y_batch, y_token, source_batch, source_token, out_batch, TILE: tl.constexpr):
    """out[b, i, :] = y[b, source[b, i], :], zeros where source is -1; grid (tokens, tiles of width, batch)."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    slot = tl.load(source + batch * source_batch + token * source_token)
    # Triton 3.9's interpreter takes no mask made of a block of bits and a scalar bit: the scalar moves the bound
    readable = tl.where(slot >= 0, width, 0)
    value = tl.load(y + batch * y_batch + slot * y_token + column, mask=column < readable, other=0)
    tl.store(out + batch * out_batch + token * width + column, value, mask=column < width)


def work(architecture: Architecture, y: Tensor, source: Tensor) -> Work:
    """One launch.  y with features that are not contiguous is copied first."""
    batch, kept, tokens = y.shape[0], y.shape[1], source.shape[1]
    out = y.new_empty((batch, tokens, *y.shape[2:]))
    flat = y.flatten(2) if y.dim() > 3 else y.reshape(batch, kept, -1) if y.dim() < 3 else y
    flat = flat if flat.stride(2) == 1 else flat.contiguous()
    config = architecture.config("restore_kernel")
    width = flat.shape[2]
    arguments: dict[str, Any] = {
        "y": flat,
        "source": source,
        "out": out,
        "width": width,
        "y_batch": flat.stride(0),
        "y_token": flat.stride(1),
        "source_batch": source.stride(0),
        "source_token": source.stride(1),
        "out_batch": tokens * width,
    }
    grid = (tokens, triton.cdiv(width, config.constants["TILE"]), batch)
    return [Launch(restore_kernel, grid, arguments, config)], out


def examples() -> Iterator[tuple[Any, ...]]:
    """ViT-B and ViT-L, the last layer to the first."""
    for batch, kept, tokens, width, dtype in [
        (256, 41, 197, 768, torch.bfloat16),
        (8, 46, 577, 1024, torch.float16),
        (1, 41, 197, 384, torch.float32),
    ]:
        y = torch.empty(batch, kept, width, dtype=dtype, device="meta")
        yield y, torch.empty(batch, tokens, dtype=torch.int64, device="meta")


TWIN = Twin(work, examples)
