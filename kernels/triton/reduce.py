"""reduce_tokens on a GPU: one launch of `segments.reduce_kernel`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .architecture import Architecture
from .launch import Twin, Work
from .segments import example_plan, reduce_launch, why_not


def work(
    architecture: Architecture,
    x: Tensor,
    slot: Tensor,
    leader: Tensor,
    moved: Tensor | None,
    weight: Tensor | None,
    normalize: bool,
) -> Work:
    """One launch."""
    y = x.new_empty((*leader.shape, x.shape[2]))
    return [reduce_launch(architecture, x, slot, leader, moved, weight, (y, None, None, None), mean=normalize)], y


def examples() -> Iterator[tuple[Any, ...]]:
    """Pruning of ViT-B, and with one token made of the rest of ViT-L."""
    x, slot, leader, _, _ = example_plan(256, 197, 140, 768, torch.bfloat16)
    yield x, slot, leader, None, None, False
    yield *example_plan(8, 577, 404, 1024, torch.float16), False


TWIN = Twin(work, examples, why_not)
