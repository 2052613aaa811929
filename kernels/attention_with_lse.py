"""attention_with_lse: attention and the log-sum-exp of its logits, which one sweep over the keys gives both.

    out, lse = attention(q, k, v, key_bias, mask, scale, causal), attention_lse(q, k, key_bias, mask, scale, causal)

Arguments and results as in those two ops.  Only lowering to a GPU makes this op, where a graph has both; its definition
is the two.  Raises nothing of its own.  Source: methods 0.7.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..op import Op, define_op
from . import attention, attention_lse
from .attention import ATTENTION, MaybeTensor
from .attention_lse import ATTENTION_LSE


def reference(
    q: Tensor, k: Tensor, v: Tensor, key_bias: MaybeTensor, mask: MaybeTensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """See the module."""
    lse = attention_lse.reference(q, k, key_bias, mask, scale, causal)
    return attention.reference(q, k, v, key_bias, mask, scale, causal), lse


def fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Shape rule."""
    return attention.fake(q, k, v), attention_lse.fake(q, k, *rest)


def parts(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The two ops."""
    return ATTENTION.call(q, k, v, *rest), ATTENTION_LSE.call(q, k, *rest)


def flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Those of attention: the logits are there."""
    return attention.flops(q, k, v)


def samples() -> Iterator[tuple[Any, ...]]:
    """Every third of attention's without a soft cap."""
    uncapped = [args for args in attention.samples() if len(args) == 7]
    yield from uncapped[::3]


ATTENTION_WITH_LSE = define_op(
    Op(
        name="attention_with_lse",
        schema="(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? mask, float scale, bool causal) "
        "-> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        onnx=None,
        flops=flops,
        samples=samples,
        triton="attention_with_lse",
        parts=parts,
    )
)
