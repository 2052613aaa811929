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
    norm_first: bool,
) -> Work:
    """One launch; what is not wanted is neither computed nor written."""
    norms = norm, norm_weight, norm_bias, eps, norm_first
    results = add_reduce_norm.fake(x, added, scale, slot, leader, moved, weight, valid, mean, *norms)
    wanted = (True, norm and not norm_first, *[mean and moved is not None] * 2)
    y, normed, mass, log_mass = (one if flag else None for one, flag in zip(results, wanted, strict=True))
    assert y is not None
    around: dict[str, Any] = {
        **{"added": added, "scale": scale, "valid": valid},
        **dict(zip(("norm", "norm_weight", "norm_bias", "eps", "norm_first"), norms, strict=True)),
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
    """A merged, a pruned, a scaled and a post-norm stream of ViT-B's size, other types, and the widest there may be."""
    for size, dtype, variants in [
        ((256, 197, 184, 768), torch.bfloat16, "merged pruned scaled post-norm"),
        ((1, 577, 554, 1024), torch.float16, "merged"),
        ((8, 128, 90, 384), torch.float32, "post-norm"),
        ((2, 700, 650, 8192), torch.bfloat16, "scaled post-norm"),
    ]:
        x, slot, leader, moved, weight = example_plan(*size, dtype)
        one = x.new_empty(size[-1])
        valid = torch.empty(leader.shape, dtype=torch.bool, device="meta")
        known: dict[str, tuple[Any, ...]] = {
            "merged": (x, x, None, slot, leader, moved, weight, None, True, "layer", one, one, 1e-6, False),
            "pruned": (x, x, None, slot, leader, None, None, None, False, "layer", one, one, 1e-6, False),
            "scaled": (x, x, one, slot, leader, moved, weight, None, True, "rms", one, None, 1e-6, False),
            "post-norm": (x, x, None, slot, leader, moved, weight, valid, True, "layer", one, one, 1e-6, True),
        }
        yield from (known[name] for name in variants.split())


TWIN = Twin(work, examples, why_not)
