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
    """The first layer of a post-norm encoder, and a later one of ViT-B."""
    *plan, _ = example_plan(64, 128, 90, 384, torch.float32)
    yield *plan, None, True
    yield *example_plan(256, 184, 171, 768, torch.bfloat16), False


TWIN = Twin(work, examples, why_not)
