"""add_reduce_norm on a GPU: one launch of `segments.reduce_kernel`, which reads and writes every byte once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import add_reduce_norm
from .architecture import Architecture
from .launch import Twin, Work
from .segments import WIDEST, example_plan, reduce_launch
from .segments import why_not as why_not_reduce


def work(
    architecture: Architecture,
    x: Tensor,
    added: Tensor | None,
    scale: Tensor | None,
    slot: Tensor,
    leader: Tensor,
    moved: Tensor | None,
    weight: Tensor | None,
    valid: Tensor | None,
    mean: bool,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Work:
    """One launch; what is not wanted is neither computed nor written."""
    results = add_reduce_norm.fake(x, added, scale, slot, leader, moved, weight, valid, mean, norm)
    wanted = (True, bool(norm), *[mean and moved is not None] * 2)
    y, normed, mass, log_mass = (one if flag else None for one, flag in zip(results, wanted, strict=True))
    assert y is not None
    around: dict[str, Any] = {
        **{"added": added, "scale": scale, "valid": valid},
        **{"norm": norm, "norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps},
    }
    filled = (y, normed, mass, log_mass)
    return [reduce_launch(architecture, x, slot, leader, moved, weight, filled, mean=mean, **around)], results


def why_not(x: Tensor, *args: Any) -> str:
    """A program holds a whole row where there is a norm."""
    reason, norm = why_not_reduce(x), args[8]
    if reason or not norm or x.shape[2] <= WIDEST:
        return reason
    return f"its norm is of {x.shape[2]} features, and one program holds {WIDEST}"


def examples() -> Iterator[tuple[Any, ...]]:
    """ViT-B and ViT-L, a DINOv2, a post-norm encoder, a pruned ViT, and the widest stream there may be."""
    for size, dtype in [
        ((256, 197, 184, 768), torch.bfloat16),
        ((1, 577, 554, 1024), torch.float16),
        ((8, 257, 230, 384), torch.float32),
        ((2, 700, 650, 8192), torch.bfloat16),
    ]:
        x, slot, leader, moved, weight = example_plan(*size, dtype)
        width = x.new_empty(size[-1])
        valid = torch.empty(leader.shape, dtype=torch.bool, device="meta")
        yield x, x, None, slot, leader, moved, weight, None, True, "layer", width, width, 1e-6
        yield x, x, width, slot, leader, moved, weight, valid, True, "rms", width, None, 1e-6
        yield x, x, None, slot, leader, None, None, None, False, "layer", width, width, 1e-6


TWIN = Twin(work, examples, why_not)
