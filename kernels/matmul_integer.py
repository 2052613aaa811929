"""matmul_integer: the product of two matrices of small integers.

    out = (a - a_zero) @ (b - b_zero)

a       [..., N, K]  int8 or uint8
b       [..., K, M]  int8 or uint8, of the same or another type
a_zero  one number, [N] or [..., N, 1]   as a    None: 0
b_zero  one number, [M] or [..., 1, M]   as b    None: 0
->      [..., N, M]  int32

Exact: products are summed in float64, whose matrix product is fast where that of integers is not.  ONNX keeps it as its
MatMulInteger.  Raises nothing.  Source: the ONNX operator of that name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import OnnxCall, Op, define_op

MaybeTensor = Tensor | None


def reference(a: Tensor, b: Tensor, a_zero: MaybeTensor = None, b_zero: MaybeTensor = None) -> Tensor:
    """See the module."""
    left, right = a.double(), b.double()
    if a_zero is not None:
        left = left - per_row(a_zero).double()
    if b_zero is not None:
        right = right - b_zero.double()
    return torch.matmul(left, right).to(torch.int32)


def per_row(zero: Tensor) -> Tensor:
    """Zero points of the rows of a, so that they broadcast."""
    return zero.unsqueeze(-1) if zero.ndim == 1 and zero.shape[0] != 1 else zero


def fake(a: Tensor, b: Tensor, a_zero: MaybeTensor = None, b_zero: MaybeTensor = None) -> Tensor:
    """Shape rule."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]), dtype=torch.int32)


def onnx(a: Tensor, b: Tensor, a_zero: MaybeTensor = None, b_zero: MaybeTensor = None) -> OnnxCall:
    """The standard operator."""
    zeros = [a_zero, b_zero] if b_zero is not None else [a_zero] if a_zero is not None else []
    return OnnxCall("MatMulInteger", [a, b, *zeros], {})


def flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """2 * rows * K * M, as of a product of floats."""
    total = 2 * b[-1]
    for size in a if len(a) >= len(b) else (*b[:-2], a[-2], a[-1]):
        total *= size
    return int(total)


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 255, (1, 5, 6), generator=generator, dtype=torch.uint8)
    b = torch.randint(-128, 127, (6, 4), generator=generator, dtype=torch.int8)
    zero, column = torch.tensor(131, dtype=torch.uint8), torch.tensor([3, -2, 0, 7], dtype=torch.int8)
    yield a, b
    yield a, b, zero
    yield a, b, zero, torch.tensor(-3, dtype=torch.int8)
    yield a, b, None, column


MATMUL_INTEGER = define_op(
    Op(
        name="matmul_integer",
        schema="(Tensor a, Tensor b, Tensor? a_zero=None, Tensor? b_zero=None) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        captured=True,
    )
)
