"""Products with weights of a few bits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..packed import unpacked
from ..table import CONTRIB, op


@op("MatMulNBits", domain=CONTRIB)
def matmul_n_bits(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    block_size: int,
    bits: int = 4,
    accuracy_level: int = 0,
    weight_prepacked: int = 0,
) -> Tensor:
    """x [..., K] times a weight [N, K], see `unpacked`; one that is in the file is of floats by now.

    ONNX Runtime makes x integers too at accuracy level 4, which is faster there and less exact.
    """
    if not weight.is_floating_point():
        weight = unpacked(
            weight,
            scales,
            zero_points,
            g_idx,
            K=K,
            N=N,
            block_size=block_size,
            bits=bits,
            weight_prepacked=weight_prepacked,
        )
    return F.linear(x, weight, bias)
