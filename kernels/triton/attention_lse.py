"""`attention_lse` by the kernel of attention without values: one sweep over the keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import attention_tiles
from .architecture import Architecture
from .attention import launched, meta
from .attention_tiles import MaybeTensor
from .launch import Twin, Work


def work(
    architecture: Architecture,
    q: Tensor,
    k: Tensor,
    key_bias: MaybeTensor,
    mask: MaybeTensor,
    scale: float,
    causal: bool,
) -> Work:
    """One launch."""
    launch, _, lse = launched(architecture, q, k, None, key_bias, mask, scale, causal, lse=True)
    return [launch], lse


def why_not(q: Tensor, k: Tensor, *_: Any) -> str:
    """Other number types and head sizes."""
    return attention_tiles.why_not(q, k)


def examples() -> Iterator[tuple[Any, ...]]:
    """A Llama's prefill."""
    yield meta(torch.bfloat16, 1, 32, 8192, 128), meta(torch.bfloat16, 1, 8, 8192, 128), None, None, 128**-0.5, True


TWIN = Twin(work, examples, why_not)
