"""Layers on integers, as ONNX Runtime's quantiser writes them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..table import CONTRIB, Unsupported, op
from .attention import Hiding, attend, without_heads
from .indexing import gather
from .linear import matmul_integer
from .microsoft_attention import FILTER, padding, split_projection
from .microsoft_layers import SMALLEST, ones_of
from .quantise import dynamic_quantize_linear


@op("MatMulIntegerToFloat", domain=CONTRIB)
def matmul_integer_to_float(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The product of integer matrices times their scales, in the scales' type."""
    product = matmul_integer(a, b, a_zero, b_zero).to(a_scale.dtype) * (a_scale * b_scale)
    return product if bias is None else product + bias


@op("DynamicQuantizeMatMul", domain=CONTRIB)
def dynamic_quantize_matmul(
    a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The same of floats, which are made integers by their own range."""
    whole, scale, zero = dynamic_quantize_linear(a)
    return matmul_integer_to_float(whole, b, scale, b_scale, zero, b_zero, bias)


@op("QAttention", domain=CONTRIB)
def quantised_attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    mask_index: Tensor | None = None,
    x_zero: Tensor | None = None,
    weight_zero: Tensor | None = None,
    past: Tensor | None = None,
    *,
    num_heads: int,
    scale: float | None = None,
    mask_filter_value: float = FILTER,
    unidirectional: int = 0,
    do_rotary: int = 0,
    past_present_share_buffer: int = 0,
    outputs: int = 1,
) -> Any:
    """`Attention` whose input and projections are integers."""
    if do_rotary or past_present_share_buffer:
        raise Unsupported("it rotates queries and keys itself, or past and present share a buffer")
    joined = matmul_integer_to_float(x, weight, x_scale, weight_scale, x_zero, weight_zero, bias)
    q, k, v, offset = split_projection(joined, num_heads, past)
    hiding = Hiding(padding(mask_index, q, k, mask_filter_value), bool(unidirectional), offset)
    y, _ = attend(q, k, v, hiding, scale=scale)
    return without_heads(y) if outputs == 1 else (without_heads(y), torch.stack([k, v]))


@op("QEmbedLayerNormalization", domain=CONTRIB)
def quantised_embed_layer_normalization(
    ids: Tensor,
    segments: Tensor | None,
    words: Tensor,
    places: Tensor,
    kinds: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None,
    *scales_and_zeros: Tensor | None,
    epsilon: float = SMALLEST,
    outputs: int = 1,
) -> Any:
    """`EmbedLayerNormalization` whose tables and weights are bytes, each with a scale and a zero point.

    scales_and_zeros  of words, places, kinds, gamma and beta: their scales, then their zero points
    """

    def plain(x: Tensor, which: int) -> Tensor:
        scale, zero = scales_and_zeros[which], scales_and_zeros[which + 5]
        assert scale is not None
        return (x.to(scale.dtype) - (0 if zero is None else zero.to(scale.dtype))) * scale

    total = plain(gather(words, ids), 0) + plain(gather(places, torch.arange(ids.shape[1]).unsqueeze(0)), 1)
    if segments is not None and kinds is not None:
        total = total + plain(gather(kinds, segments), 2)
    y = F.layer_norm(total, [total.shape[-1]], plain(gamma, 3), plain(beta, 4), epsilon)
    return y if outputs == 1 else (y, ones_of(ids, mask))
