"""Weights that a file holds as numbers of a few bits, several to a byte, made floats when the file is read.

What is computed then is the product of matrices that it stands for; the numbers come back as floats in an export.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from .table import Unsupported

DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
PACKED = range(1, 5)  # places of the inputs that make the weight


def unpack_weights(graphs: list[ir.Graph], weights: dict[ir.Value, Tensor]) -> None:
    """Give every MatMulNBits whose weight is in the file a float one in its place, in place.

    What no node uses any more is taken out of `weights`.
    """
    made: dict[tuple[ir.Value | None, ...], ir.Value] = {}
    for node in [one for graph in graphs for one in graph if (one.domain, one.op_type) == (DOMAIN, OPERATOR)]:
        packed = tuple(node.inputs[i] if i < len(node.inputs) else None for i in PACKED)
        given = [value for value in packed if value is not None]
        if not all(value in weights for value in given):
            continue
        if packed not in made:
            numbers = {name: one.value for name, one in node.attributes.items()}
            try:
                weight = unpacked(*(None if one is None else weights[one] for one in packed), **numbers)
            except (Unsupported, RuntimeError, TypeError, ValueError, IndexError, ZeroDivisionError):
                continue  # evaluating the node says what is wrong with it
            made[packed] = ir.Value(name=f"{given[0].name}.unpacked")
            weights[made[packed]] = weight
        node.replace_input_with(1, made[packed])
        for place in PACKED[1 : len(node.inputs) - 1]:
            node.replace_input_with(place, None)
    for value in {value for packed in made for value in packed if value is not None}:
        if not value.uses() and not value.is_graph_output():
            del weights[value]


def unpacked(
    packed: Tensor | None,
    scales: Tensor | None,
    zeros: Tensor | None,
    groups: Tensor | None,
    *,
    K: int,
    N: int,
    block_size: int,
    bits: int = 4,
    weight_prepacked: int = 0,
    accuracy_level: int = 0,
) -> Tensor:
    """The weight [N, K] in the scales' type: (number - zero point) scale, both per block of a row.

    packed  [N, blocks, block_size bits / 8] uint8, lowest bits first
    scales  [N, blocks]
    zeros   the same in the scales' type, or packed [N, blocks bits / 8] uint8; 2^(bits - 1) where there are none
    groups  the block of each column, [K]; by `block_size` columns where not given

    Raises:
        Unsupported: the weight is laid out otherwise, or its sizes are not those.
    """
    blocks = -(-K // block_size)
    if packed is None or scales is None or weight_prepacked or bits not in (2, 4, 8):
        raise Unsupported(f"its weight has {bits} bits, or is laid out for one kind of device")
    if min(N, K) < 1 or packed.numel() * 8 != N * blocks * block_size * bits or scales.numel() != N * blocks:
        raise Unsupported(f"its weight has sizes {list(packed.shape)}, which are not those of [{N}, {K}]")
    numbers = _numbers(packed.reshape(N, blocks, -1), bits).reshape(N, -1)[:, :K]
    scales = scales.reshape(N, blocks)
    if zeros is None:
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    elif zeros.dtype == torch.uint8:
        zeros = _numbers(zeros.reshape(N, -1), bits)[:, :blocks]
    block = torch.arange(K) // block_size if groups is None else groups.to(torch.int64)
    shifted = numbers.to(scales.dtype) - zeros.reshape(N, blocks).to(scales.dtype)[:, block]
    return shifted * scales[:, block]


def _numbers(packed: Tensor, bits: int) -> Tensor:
    """The numbers in bytes along the last axis."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)
