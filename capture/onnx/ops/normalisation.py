"""Normalisation layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..table import Unsupported, from_start, op
from ..tensors import DTYPES


@op("LayerNormalization", since=17)
def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Any:
    """x less its mean over its deviation, over all axes from `axis` on; the mean and 1 / deviation if asked for."""
    axis = from_start(axis, x.ndim)
    whole = list(x.shape[axis:])
    same = list(scale.shape) == whole and (bias is None or list(bias.shape) == whole)
    y = F.layer_norm(x, whole, scale if same else None, bias if same else None, epsilon)
    if not same:
        y = y * scale if bias is None else y * scale + bias
    if outputs == 1:
        return y
    wide = x.to(DTYPES[stash_type])
    axes = list(range(axis, x.ndim))
    mean = wide.mean(axes, keepdim=True)
    return y, mean, (wide.var(axes, correction=0, keepdim=True) + epsilon).rsqrt()


@op("RMSNormalization", since=23)
def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """x over the root of its mean square, over all axes from `axis` on."""
    axis = from_start(axis, x.ndim)
    whole = list(x.shape[axis:])
    if list(scale.shape) == whole:
        return F.rms_norm(x, whole, scale, epsilon)
    return F.rms_norm(x, whole, None, epsilon) * scale


@op("BatchNormalization")
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    training_mode: int = 0,
    outputs: int = 1,
) -> Any:
    """Normalisation by stored statistics per channel; in training mode by its own, with the running ones updated."""
    if not spatial:
        raise Unsupported("it has statistics per place")
    shape = [1, -1, *[1] * (x.ndim - 2)]
    running: tuple[Tensor, ...] = ()
    if training_mode:
        axes = [0, *range(2, x.ndim)]
        now = x.mean(axes), x.var(axes, correction=0)
        running = tuple(old * momentum + new * (1 - momentum) for old, new in zip((mean, variance), now, strict=True))
        mean, variance = now
    scale, bias, mean, variance = (one.reshape(shape) for one in (scale, bias, mean, variance))
    y = ((x - mean) / torch.sqrt(variance + epsilon) * scale + bias).to(x.dtype)
    return (y, *running)[:outputs] if running else y


@op("InstanceNormalization")
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Every channel of every example normalised by itself."""
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@op("GroupNormalization", since=21)
def group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Every group of channels normalised by itself; scale and bias per channel."""
    return F.group_norm(x, num_groups, scale, bias, epsilon)


@op("GroupNormalization", since=18)
def group_normalization_by_group(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5
) -> Tensor:
    """As from opset 21 on, with scale and bias per group."""
    each = x.shape[1] // num_groups
    return F.group_norm(x, num_groups, scale.repeat_interleave(each), bias.repeat_interleave(each), epsilon)


@op("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """x over its p-norm along an axis; zero where that is zero."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@op("MeanVarianceNormalization")
def mean_variance_normalization(x: Tensor, *, axes: list[int] | None = None) -> Tensor:
    """x less its mean over its deviation along some axes."""
    over = [0, 2, 3] if axes is None else axes
    centred = x - x.mean(over, keepdim=True)
    return centred / (torch.sqrt(torch.mean(centred * centred, over, keepdim=True)) + 1e-9)
