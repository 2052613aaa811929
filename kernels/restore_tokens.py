"""restore_tokens: every original token gets the value of the slot it went to.

    out[b, i] = y[b, source[b, i]], or zero (False) where source[b, i] == -1

y       [B, N', ...]  any dtype, any trailing dimensions (also none)
source  [B, N0]       int64, slot of each original token in [0, N'), -1: dropped
->      [B, N0, ...]  as y

A copy: exact, no ties.  Raises IndexError (torch) for a slot outside y.  Source: the unmerge of methods 1.4 (iv).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor

from ..op import OnnxCall, Op, define_op
from .opset import STANDARD as op
from .opset import TAMIS
from .rows import take_rows


def reference(y: Tensor, source: Tensor) -> Tensor:
    """See the module."""
    # a row of zeros at the end is what dropped tokens read: cheaper than to blank them afterwards
    padded = torch.cat([y, y.new_zeros((y.shape[0], 1, *y.shape[2:]))], 1)
    return take_rows(padded, torch.where(source < 0, y.shape[1], source))


def fake(y: Tensor, source: Tensor) -> Tensor:
    """Shape rule."""
    return y.new_empty((y.shape[0], source.shape[1], *y.shape[2:]))


@script(TAMIS, default_opset=op)
def RestoreTokens(y, source):
    # a row of zeros at the end is what index -1 reads
    shape = op.Concat(op.Shape(y, start=0, end=1), [1], op.Shape(y, start=2), axis=0)
    zeros = op.Expand(op.CastLike(0, y), shape)
    return op.GatherND(op.Concat(y, zeros, axis=1), op.Unsqueeze(source, [2]), batch_dims=1)


def onnx(y: Tensor, source: Tensor) -> OnnxCall:
    """Calls RestoreTokens."""
    return OnnxCall(RestoreTokens, [y, source], {})


def flops(y: Any, source: Any, **_: Any) -> int:
    """It only copies."""
    return 0


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    for batch, kept, tokens, trailing in [(2, 3, 5, (4,)), (1, 1, 7, (2, 3)), (3, 4, 4, ()), (0, 3, 5, (4,))]:
        y = torch.randn(batch, kept, *trailing, generator=generator)
        source = torch.randint(-1, kept, (batch, tokens), generator=generator)
        yield y, source
        yield y > 0, source
        yield (y * 10).long(), source
        yield y.half(), source


RESTORE_TOKENS = define_op(
    Op(
        name="restore_tokens",
        schema="(Tensor y, Tensor source) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="restore",
    )
)
