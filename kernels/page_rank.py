"""page_rank: importance that flows along attention: every token hands its own on to those it attends to, step by step.

    s_0[b, h, i] = start[b, i]
    s_t[b, h, j] = sum_i s_(t-1)[b, h, i] * A[b, h, i, j] / sum_m A[b, h, i, m]      i, j, m over the kept tokens

attention  [B, H, N, N]  float    A, rows of softmax: what token i gives to token j
start      [B, N]        float32  importance of each token before the first step, the same in every head
kept       [B, N]        bool     tokens of the graph, all others are as if they were not there; None: all, and rows are
                                  taken as they are
steps      int                    at least 1
->         [B, H, N]     float32 (float64 for float64 input); 0 at tokens that are not kept

Float32 arithmetic; the matrix is read once a step and never copied.  A row that gives nothing to any kept token gives
nothing at all.  Sums over the kept tokens stay what they were where every row gives something.  Raises nothing.
Source: methods card 5.2, weighted page rank of Zero-TPrune (Wang et al. 2024).  Differs from its displayed equation,
which multiplies by A: of a uniform start that is uniform for ever.  Rows of kept tokens add up to 1 again, of which it
says nothing; otherwise importance would leak away through the others, at a rate of its own for each token.
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
from .precision import compute_dtype


def reference(attention: Tensor, start: Tensor, kept: Tensor | None, steps: int) -> Tensor:
    """See the module."""
    matrix = attention.to(compute_dtype(attention))
    importance = start.to(matrix.dtype).unsqueeze(1).expand(attention.shape[:3])
    if kept is None:
        return _steps(matrix, importance, None, steps)
    keep = kept.to(matrix.dtype).unsqueeze(1)
    given = (matrix @ keep.unsqueeze(3)).squeeze(3)
    return _steps(matrix, importance, keep / torch.where(given == 0, 1.0, given), steps) * keep


def _steps(matrix: Tensor, importance: Tensor, weight: Tensor | None, steps: int) -> Tensor:
    for _ in range(steps):
        handed = importance if weight is None else importance * weight
        importance = (handed.unsqueeze(2) @ matrix).squeeze(2)
    return importance


def fake(attention: Tensor, start: Tensor, kept: Tensor | None, steps: int) -> Tensor:
    """Shape rule."""
    return attention.new_empty(attention.shape[:3], dtype=compute_dtype(attention))


@script(TAMIS, default_opset=op)
def PageRank(attention, start, kept, steps: int):
    matrix = op.Cast(attention, to=1)
    keep = op.Unsqueeze(op.Cast(op.Expand(kept, op.Shape(start)), to=1), [1])
    given = op.Squeeze(op.MatMul(matrix, op.Unsqueeze(keep, [3])), [3])
    weight = keep / op.Where(given == 0.0, 1.0, given)
    importance = op.Expand(op.Unsqueeze(op.Cast(start, to=1), [1]), op.Shape(given))
    for _ in range(steps):
        importance = op.Squeeze(op.MatMul(op.Unsqueeze(importance * weight, [2]), matrix), [2])
    return importance * keep


def onnx(attention: Tensor, start: Tensor, kept: Tensor | None, steps: int) -> OnnxCall:
    """Calls PageRank, whose steps are a loop."""
    kept = torch.ones((1, 1), dtype=torch.bool, device=start.device) if kept is None else kept
    return OnnxCall(PageRank, [attention, start, kept], {"steps": steps})


def flops(attention: Any, start: Any, kept: Any, steps: int, **_: Any) -> int:
    """A product of vector and matrix a step, and one for the sums of rows: 2 * B * H * N * N each."""
    batch, heads, rows, columns = attention
    return 2 * batch * heads * rows * columns * (steps + (kept is not None))


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    for batch, heads, tokens, steps in [(2, 3, 9, 1), (3, 2, 17, 5), (1, 1, 1, 2), (2, 2, 6, 30), (0, 2, 5, 1)]:
        attention = (2 * torch.randn(batch, heads, tokens, tokens, generator=generator)).softmax(-1)
        start = torch.rand(batch, tokens, generator=generator)
        kept = torch.rand(batch, tokens, generator=generator) < 0.7
        yield attention, start, None, steps
        yield attention, start, kept, steps
        yield attention * kept[:, None, :, None], start, kept, steps  # rows of padding are 0
    nothing = torch.eye(4).expand(2, 1, 4, 4).clone()
    nothing[:, :, 2] = torch.tensor([0.0, 1, 0, 0])
    yield nothing, torch.ones(2, 4), torch.tensor([[True, False, True, True]]).expand(2, 4), 3


PAGE_RANK = define_op(
    Op(
        name="page_rank",
        schema="(Tensor attention, Tensor start, Tensor? kept, int steps) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton="page_rank",
    )
)
