"""`attention_with_lse` by the kernel of attention, which has its log-sum-exp at hand: one launch, one store more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .architecture import Architecture
from .attention import bias_of, launched, meta, refuses
from .launch import Twin, Work


def work(architecture: Architecture, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Work:
    """One launch."""
    launch, out, lse = launched(architecture, q, k, v, *rest, lse=True)
    return [launch], (out, lse)


def examples() -> Iterator[tuple[Any, ...]]:
    """ViT-L after merging."""
    large = meta(torch.float16, 256, 16, 577, 64)
    yield large, large, large, bias_of(large), None, 0.125, False


TWIN = Twin(work, examples, refuses)
