"""merge_tokens on a GPU: one launch of `segments.reduce_kernel`."""

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
    moved: Tensor,
    weight: Tensor | None,
    spare: bool,
) -> Work:
    """One launch; unused entries of `moved` are told by their leaders, so `spare` makes no difference."""
    batch, slots = leader.shape
    y, mass = x.new_empty((batch, slots, x.shape[2])), x.new_empty((batch, slots), dtype=torch.float32)
    return [reduce_launch(architecture, x, slot, leader, moved, weight, (y, None, mass, None), mean=True)], (y, mass)


def examples() -> Iterator[tuple[Any, ...]]:
    """Post-norm encoders and ViTs, with sizes and without."""
    for size, dtype in [((64, 128, 90, 384), torch.float32), ((256, 197, 184, 768), torch.bfloat16)]:
        x, slot, leader, moved, weight = example_plan(*size, dtype)
        yield x, slot, leader, moved, None, False
        yield x, slot, leader, moved, weight, True


TWIN = Twin(work, examples, why_not)
