"""add_reduce_norm: what stands around a reduction in a transformer block, in one pass over the tokens.

    t = x + scale * added,  y = the tokens t of each slot reduced to one,  normed = norm(y)
    with norm_first         y = the tokens norm(t) of each slot reduced to one

x            [B, N, C]  float     token features
added        [B, N, C]  as x      what the block adds to them; None: nothing
scale        [C]        float     of what is added; None: 1
slot, leader, moved, weight       the plan, as for reduce_tokens
valid        [B, N']    bool      slots that hold tokens: the others weigh 0; None: all do
mean         bool                 mean by weight, as merge_tokens, or sum, as reduce_tokens
norm         "layer", "rms", ""   of the C features, or none
norm_weight, norm_bias  [C]       None: 1 and 0;  eps  added to the variance
norm_first   bool                 the norm stands before the reduction
->  y         [B, N', C]  as x
    normed    [B, N', C]  as x, [0] without a norm after the reduction
    mass      [B, N']     float32, what the tokens of a slot weigh; [0] for sums, and for leaders alone
    log_mass  [B, N']     float32, its logarithm, -inf for slots that hold nothing

Float32 arithmetic from end to end (float64 for float64 input): y and normed are rounded once, from the same numbers,
where the ops apart round the sum and y in between.  Only lowering for GPUs makes it (`lowering/fusion_merge.py`), so it
has no form in ONNX.  Raises nothing of its own.
Source: merging is free if it is the pass that adds and normalises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..op import Op, define_op
from .merge_tokens import drawn_plan, merged_tokens, sample_plan, uses
from .precision import compute_dtype
from .reduce_tokens import reference as reduced_tokens


def reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the module."""
    dtype = compute_dtype(x)
    total = x.to(dtype)
    if added is not None:
        total = total + (added.to(dtype) if scale is None else added.to(dtype) * scale.to(dtype))
    gamma, beta = (one if one is None else one.to(dtype) for one in (norm_weight, norm_bias))
    if norm and norm_first:
        total = _norm(total, norm, gamma, beta, eps)
    if mean and moved is not None:
        y, mass = merged_tokens(total, slot, leader, moved, weight, uses(slot, leader, moved))
        mass = mass if valid is None else mass.masked_fill(~valid, 0)
    else:
        y, mass = reduced_tokens(total, slot, leader, moved, weight, mean), _nothing(x, torch.float32)
    normed = _norm(y, norm, gamma, beta, eps) if norm and not norm_first else _nothing(x, x.dtype)
    return y.to(x.dtype), normed.to(x.dtype), mass, mass.log()


def _norm(y: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if norm == "layer":
        return F.layer_norm(y, [y.shape[2]], weight, bias, eps)
    y = y * torch.rsqrt(y.square().mean(2, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _nothing(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty((0,), dtype=dtype)


def fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shape rule."""
    shape, slots = (x.shape[0], leader.shape[1], x.shape[2]), (x.shape[0], leader.shape[1])
    masses = slots if mean and moved is not None else (0,)
    normed = x.new_empty(shape if norm and not norm_first else (0,))
    mass, log_mass = (x.new_empty(masses, dtype=torch.float32) for _ in range(2))
    return x.new_empty(shape), normed, mass, log_mass


def flops(x: Any, added: Any, scale: Any, slot: Any, leader: Any, moved: Any, *_: Any, **__: Any) -> int:
    """A multiply and an add per element that moves: what stands around it counts nothing elsewhere either."""
    return 0 if moved is None else 2 * moved[0] * moved[1] * x[2]


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests: with and without each of the parts."""
    x, slot, leader, moved, weight = sample_plan()
    generator = torch.Generator().manual_seed(1)
    added = torch.randn(x.shape, generator=generator)
    gamma, beta, scale = torch.randn(3, x.shape[2], generator=generator)
    valid = torch.tensor([[True, True, False, True], [True, True, True, True]])
    for dtype in (torch.float32, torch.float16):
        a, b = x.to(dtype), added.to(dtype)
        g, h, s = (one.to(dtype) for one in (gamma, beta, scale))
        yield a, b, None, slot, leader, moved, weight, None, True, "layer", g, h, 1e-6, False
        yield a, b, None, slot, leader, moved, weight, valid, True, "layer", g, h, 1e-6, True
        yield a, b, s, slot, leader, moved, None, valid, True, "rms", g, None, 1e-5, False
        yield a, None, s, slot, leader, moved, None, None, False, "rms", g, None, 1e-5, True
        yield a, None, None, slot, leader, moved, weight, valid, True, "", None, None, 0.0, False
        yield a, b, s, slot, leader, moved, weight, None, False, "layer", None, None, 1e-6, False
        yield a, b, None, slot, leader, None, None, None, False, "layer", g, h, 1e-6, False
    none = slot[:0], leader[:0], moved[:0]
    yield x[:0], added[:0], None, *none, None, None, True, "layer", gamma, beta, 1e-6, False
    x, *plan, weight = drawn_plan(2, 83, 37, 131)
    yield x, x.flip(1), x[0, 0], *plan, weight, None, True, "layer", x[0, 1], x[0, 2], 1e-6, False


ADD_REDUCE_NORM = define_op(
    Op(
        name="add_reduce_norm",
        schema="(Tensor x, Tensor? added, Tensor? scale, Tensor slot, Tensor leader, Tensor? moved, Tensor? weight,"
        " Tensor? valid, bool mean, str norm, Tensor? norm_weight, Tensor? norm_bias, float eps,"
        " bool norm_first)"
        " -> (Tensor y, Tensor normed, Tensor mass, Tensor log_mass)",
        reference=reference,
        fake=fake,
        onnx=None,
        flops=flops,
        samples=samples,
        triton="reduce_norm",
    )
)
