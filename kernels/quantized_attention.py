"""quantized_attention: attention whose logits and probabilities are rounded to integers on the way.

    P = q_i . k_j;   L = scale * P + mask[b, h, i, j];   A = softmax_j(L + key_bias[b, j]);   out = A v
    with the values at every place of `places` quantised and dequantised:
        0  P    1  scale * P    2  L    3  A

q, k, v, key_bias, mask, scale, causal, out   as in attention
scales   Tensor[]  one number each, float32
zeros    Tensor[]  one number each, of the type that is rounded to
places   int[]     ascending; where several are at one place, they follow each other

The bias of token sizes is added behind all rounding of the logits: it is not what they were calibrated for.  A query
that sees no key gets zeros.  Raises nothing.
Source: ours; this is what ONNX Runtime's static quantisation leaves of an attention that was written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from ..op import Op, define_op
from . import attention, dequantize_linear, quantize_linear
from .attention import added_to_logits, grouped_logits, grouped_mix

MaybeTensor = Tensor | None
PRODUCT, SCALED, MASKED, PROBABILITIES = range(4)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: MaybeTensor,
    mask: MaybeTensor,
    scale: float,
    causal: bool,
    scales: list[Tensor],
    zeros: list[Tensor],
    places: list[int],
) -> Tensor:
    """See the module."""
    return _computed(_rounded, q, k, v, key_bias, mask, scale, causal, scales, zeros, places)


def parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: MaybeTensor,
    mask: MaybeTensor,
    scale: float,
    causal: bool,
    scales: list[Tensor],
    zeros: list[Tensor],
    places: list[int],
) -> Tensor:
    """The same with the rounding as ops."""
    return _computed(_by_ops, q, k, v, key_bias, mask, scale, causal, scales, zeros, places)


def _computed(
    rounded: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: MaybeTensor,
    mask: MaybeTensor,
    scale: float,
    causal: bool,
    scales: list[Tensor],
    zeros: list[Tensor],
    places: list[int],
) -> Tensor:
    def at(place: int, x: Tensor) -> Tensor:
        for one, step, zero in zip(places, scales, zeros, strict=True):
            x = rounded(x, step, zero) if one == place else x
        return x

    logits = at(PRODUCT, grouped_logits(q, k, 1.0))
    logits = at(SCALED, logits if scale == 1.0 else logits * scale)
    added = added_to_logits(q, k, None, mask, causal)
    logits = at(MASKED, logits if added is None else logits + added.to(logits.dtype))
    if key_bias is not None:
        logits = logits + key_bias.to(logits.dtype)[:, None, None, :]
    weights = logits.softmax(-1)
    if added is not None or key_bias is not None:
        weights = torch.where(weights.isnan(), torch.zeros_like(weights), weights)
    return grouped_mix(at(PROBABILITIES, weights), v, q)


def _rounded(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    whole = quantize_linear.reference(x, scale, zero, 1, 0, zero.dtype)
    return dequantize_linear.reference(whole, scale, zero, 1, 0)


def _by_ops(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    whole = quantize_linear.QUANTIZE.call(x, scale, zero, 1, 0, zero.dtype)
    return dequantize_linear.DEQUANTIZE.call(whole, scale, zero, 1, 0)


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    numbers = [torch.tensor(0.1), torch.tensor(0.02), torch.tensor(0.05), torch.tensor(1 / 255)]
    zeros = [torch.tensor(3, dtype=torch.int8) for _ in range(3)] + [torch.tensor(0, dtype=torch.uint8)]
    places = cycle([[PRODUCT, PROBABILITIES], [SCALED], [PRODUCT, SCALED, MASKED, PROBABILITIES], [MASKED]])
    for q, k, v, key_bias, mask, scale, causal, *capped in attention.samples():
        if q.dtype == torch.float32 and not capped:
            chosen = next(places)
            quantizers = [numbers[i] for i in chosen], [zeros[i] for i in chosen]
            yield q, k, v, key_bias, mask, scale, causal, *quantizers, chosen


QUANTIZED_ATTENTION = define_op(
    Op(
        name="quantized_attention",
        schema="(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? mask, float scale, bool causal, "
        "Tensor[] scales, Tensor[] zeros, int[] places) -> Tensor",
        reference=reference,
        fake=attention.fake,
        onnx=None,
        parts=parts,
        flops=attention.flops,
        samples=samples,
        captured=True,
    )
)
