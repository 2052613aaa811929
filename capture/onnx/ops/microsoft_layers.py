"""What ONNX Runtime's optimizers fuse around attention: embeddings, norms, activations and products of matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..table import CONTRIB, Unsupported, from_start, op
from .indexing import gather
from .linear import conv, gemm
from .normalisation import rms_normalization

SMALLEST = 1e-12  # the epsilon of layers that name none


@op("FastGelu", domain=CONTRIB)
def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The tanh approximation of GELU."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@op("GemmFastGelu", domain=CONTRIB)
def gemm_fast_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The tanh approximation of GELU of a product."""
    return fast_gelu(torch.matmul(x, weight), bias)


@op("BiasGelu", domain=CONTRIB)
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of a sum."""
    return F.gelu(x + bias)


@op("Gelu", domain=CONTRIB)
def gelu(x: Tensor) -> Tensor:
    """GELU."""
    return F.gelu(x)


@op("QuickGelu", domain=CONTRIB)
def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    """x sigmoid(alpha x)."""
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(x * alpha)


@op("BiasSplitGelu", domain=CONTRIB)
def bias_split_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """The first half of the features of a sum times GELU of the second."""
    left, right = (x + bias).chunk(2, -1)
    return left * F.gelu(right)


@op("BiasAdd", domain=CONTRIB)
def bias_add(x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """A residual sum with a bias."""
    return x + bias + skip


@op("FusedMatMul", "TransposeMatMul", domain=CONTRIB)
def fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """alpha a b, with the last two axes of either exchanged, before that its first axis put behind the batch axes."""
    product = torch.matmul(_turned(a, transA, transBatchA), _turned(b, transB, transBatchB))
    return product if alpha == 1.0 else product * alpha


def _turned(x: Tensor, matrix: int, batch: int) -> Tensor:
    x = x.movedim(0, -2) if batch else x
    return x.transpose(-2, -1) if matrix else x


# --- with an activation ---------------------------------------------------------------------------------------------


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "": lambda x: x,
    "Relu": F.relu,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "LeakyRelu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: torch.clamp(alpha * x + beta, 0, 1),
    "Clip": lambda x, low=None, high=None: torch.clamp(x, low, high),
}


def _activated(x: Tensor, name: str, parameters: list[float]) -> Tensor:
    if name not in ACTIVATIONS:
        raise Unsupported(f"its activation {name!r} is not known")
    return ACTIVATIONS[name](x, *parameters)


@op("FusedGemm", domain=CONTRIB)
def fused_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """An activation of alpha a b + beta c."""
    parameters = [x for x in (activation_alpha, activation_beta, activation_gamma) if x is not None]
    product = gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
    return _activated(product, activation, parameters)


@op("FusedConv", domain=CONTRIB)
def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "",
    activation_params: list[float] | None = None,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """An activation of a convolution plus a residual."""
    y = conv(x, weight, bias, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)
    return _activated(y if residual is None else y + residual, activation, activation_params or [])


# --- norms ----------------------------------------------------------------------------------------------------------


@op("SimplifiedLayerNormalization")
@op("SimplifiedLayerNormalization", domain=CONTRIB)
def simplified_layer_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1, outputs: int = 1
) -> Any:
    """RMSNormalization as ONNX Runtime called it before the standard had it; 1 / root of the mean square if asked."""
    y = rms_normalization(x, scale, axis=axis, epsilon=epsilon)
    if outputs == 1:
        return y
    axes = list(range(from_start(axis, x.ndim), x.ndim))
    return y, (x.float().square().mean(axes, keepdim=True) + epsilon).rsqrt()


@op("SkipLayerNormalization", domain=CONTRIB)
def skip_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = SMALLEST,
    outputs: int = 1,
) -> Any:
    """The norm of a residual sum; the sum itself is the fourth result.

    The mean and deviation, the second and third, are made in training only.
    """
    total = _sum(x, skip, bias)
    return _with_sum(F.layer_norm(total, [x.shape[-1]], gamma, beta, epsilon), total, outputs)


@op("SkipSimplifiedLayerNormalization", domain=CONTRIB)
def skip_simplified_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = SMALLEST,
    outputs: int = 1,
) -> Any:
    """The root-mean-square norm of a residual sum; the sum itself is the fourth result."""
    total = _sum(x, skip, bias)
    return _with_sum(F.rms_norm(total, [x.shape[-1]], gamma, epsilon), total, outputs)


def _sum(x: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    return x + skip if bias is None else (x + bias) + skip


def _with_sum(y: Tensor, total: Tensor, outputs: int) -> Any:
    return y if outputs == 1 else (y, None, None, total)[:outputs]


@op("EmbedLayerNormalization", domain=CONTRIB)
def embed_layer_normalization(
    ids: Tensor,
    segments: Tensor | None,
    words: Tensor,
    places: Tensor,
    kinds: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    epsilon: float = SMALLEST,
    mask_index_type: int = 0,
    outputs: int = 1,
) -> Any:
    """BERT's embeddings: the norm of the sum of word, place and segment; how many of `mask` are 1; the sum."""
    where = torch.arange(ids.shape[1]).unsqueeze(0) if positions is None else positions
    total = gather(words, ids) + gather(places, where)
    if segments is not None and kinds is not None:
        total = total + gather(kinds, segments)
    y = F.layer_norm(total, [total.shape[-1]], gamma, beta, epsilon)
    return y if outputs == 1 else (y, ones_of(ids, mask), total)[:outputs]


def ones_of(ids: Tensor, mask: Tensor | None) -> Tensor:
    """How many entries of each row of a mask are 1, [B] int32; zeros without a mask."""
    counted = torch.zeros_like(ids[:, 0]) if mask is None else (mask == 1).sum(1)
    return counted.to(torch.int32)
