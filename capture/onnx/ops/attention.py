"""Attention and rotary embedding as the standard has them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..table import op
from ..tensors import DTYPES

STEPS = ("product", "capped", "biased", "probabilities")  # by `qk_matmul_output_mode`


@op("Attention", since=23)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    is_causal: int = 0,
    q_num_heads: int | None = None,
    kv_num_heads: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    qk_matmul_output_mode: int = 0,
    left_window_size: int = -1,
    right_window_size: int = -1,
    outputs: int = 1,
) -> Any:
    """softmax(q k^T scale + mask) v of [B, H, N, D], or of [B, N, H D] with the numbers of heads given.

    Past keys and values come first; `lengths` says how many keys of each row are real.  Causality and windows count
    from the end of the past.  A query that sees no key gets zeros.
    """
    joined = q.ndim == 3
    if joined:
        assert q_num_heads is not None
        assert kv_num_heads is not None
        q, k, v = with_heads(q, q_num_heads), with_heads(k, kv_num_heads), with_heads(v, kv_num_heads)
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    offset: Any = 0 if past_key is None else past_key.shape[2]
    if lengths is not None:
        offset = (lengths - q.shape[2]).reshape(-1, 1, 1, 1)
    hiding = Hiding(padded(mask, k.shape[2]), bool(is_causal), offset, lengths, left_window_size, right_window_size)
    wanted = STEPS[qk_matmul_output_mode] if outputs == 4 else None
    precision = None if softmax_precision is None else DTYPES[softmax_precision]
    y, product = attend(q, k, v, hiding, scale=scale, softcap=softcap, wanted=wanted, precision=precision)
    y = without_heads(y) if joined else y
    return y if outputs == 1 else (y, k, v, product)[:outputs]


@dataclass(frozen=True)
class Hiding:
    """What keys a query sees.

    mask     boolean, true where seen, or added to the logits; it broadcasts to [B, H, N, M]
    causal   whether no later key is seen than the query itself, query i having place `offset` + i among the keys
    offset   a number, or integers [B, 1, 1, 1]
    lengths  how many keys of each row are real, [B]
    left, right  how many keys before and after its own place a query sees; below zero: all
    """

    mask: Tensor | None = None
    causal: bool = False
    offset: Any = 0
    lengths: Tensor | None = None
    left: int = -1
    right: int = -1

    @property
    def by_flag(self) -> bool:
        """Whether plain causality says it all."""
        plain = type(self.offset) is int and not self.offset and self.lengths is None
        return self.causal and self.mask is None and plain and self.left < 0 and self.right < 0

    def whole(self, q: Tensor, k: Tensor) -> Tensor | None:
        """One mask for all that hides keys: boolean, or additive if the given one is."""
        query = torch.arange(q.shape[2]).unsqueeze(1) + self.offset
        key = torch.arange(k.shape[2])
        conditions = [key <= query] if self.causal else []
        conditions += [query - key <= self.left] if self.left >= 0 else []
        conditions += [key - query <= self.right] if self.right >= 0 else []
        conditions += [key < self.lengths.reshape(-1, 1, 1, 1)] if self.lengths is not None else []
        if not conditions:
            return self.mask
        seen = conditions[0]
        for condition in conditions[1:]:
            seen = seen & condition
        if self.mask is None:
            return seen
        return seen & self.mask if self.mask.dtype == torch.bool else torch.where(seen, self.mask, -math.inf)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hiding: Hiding,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    wanted: str | None = None,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T scale, capped, + mask) v of q [B, H, N, D] and k, v [B, G, M, D], and one of its steps.

    scale   1 / sqrt(D) unless given
    softcap  logits x become softcap * tanh(x / softcap); 0: as they are
    sink    a logit per head, [H], of a key without a value that every query sees
    wanted  which step is returned beside the result: one of STEPS
    """
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    scale = scale if scale else 1 / math.sqrt(q.shape[-1])
    if wanted is None and not softcap and sink is None:
        mask = None if hiding.by_flag else hiding.whole(q, k)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=hiding.by_flag, scale=scale), None
    y, steps = _written_out(q, k, v, hiding.whole(q, k), scale, softcap, sink, precision)
    return y, None if wanted is None else steps[wanted]


def with_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H D] to [B, H, N, D]."""
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def without_heads(x: Tensor) -> Tensor:
    """[B, H, N, D] to [B, N, H D]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """[B, G, N, D] to [B, H, N, D]: each key-value head for the query heads of its group."""
    batch, groups, tokens, size = x.shape
    if groups == heads:
        return x
    return x.unsqueeze(2).expand(batch, groups, heads // groups, tokens, size).reshape(batch, heads, tokens, size)


def padded(mask: Tensor | None, keys: Any) -> Tensor | None:
    """A mask may be shorter than the keys; those it does not speak of are hidden."""
    if mask is None or mask.shape[-1] == keys:
        return mask
    return F.pad(mask, [0, keys - mask.shape[-1]], value=False if mask.dtype == torch.bool else -math.inf)


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sink: Tensor | None,
    precision: torch.dtype | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same step by step, and the steps."""
    product = torch.matmul(q * math.sqrt(scale), (k * math.sqrt(scale)).transpose(-2, -1))
    steps = {"product": product}
    if softcap:
        product = torch.tanh(product / softcap) * softcap
    steps["capped"] = product
    if mask is not None:
        bias = torch.where(mask, 0.0, -math.inf).to(q.dtype) if mask.dtype == torch.bool else mask
        product = product + bias
    steps["biased"] = product
    probabilities = _softmax(product, sink, precision)
    if mask is not None and sink is None:
        hidden = (
            (~mask).all(-1, keepdim=True) if mask.dtype == torch.bool else (mask == -math.inf).all(-1, keepdim=True)
        )
        probabilities = torch.where(hidden, 0.0, probabilities)
    probabilities = probabilities.to(q.dtype)
    steps["probabilities"] = probabilities
    return torch.matmul(probabilities, v), steps


def _softmax(logits: Tensor, sink: Tensor | None, precision: torch.dtype | None) -> Tensor:
    if sink is None:
        return torch.softmax(logits, -1, dtype=precision)
    extra = sink.reshape(-1, 1, 1).expand(*logits.shape[:-1], 1)
    return torch.softmax(torch.cat([logits, extra], -1), -1, dtype=precision)[..., :-1]


@op("RotaryEmbedding", since=23)
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Pairs of features of [B, H, N, D], or of [B, N, H D], turned by angles per position."""
    joined = x.ndim == 3
    if joined:
        batch, tokens, width = x.shape
        x = x.reshape(batch, tokens, num_heads, width // num_heads).transpose(1, 2)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    size = rotary_embedding_dim or x.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned[..., : size // 2], turned[..., size // 2 :]
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    y = turned if size == x.shape[-1] else torch.cat([turned, rest], -1)
    return y.transpose(1, 2).reshape(batch, tokens, width) if joined else y
