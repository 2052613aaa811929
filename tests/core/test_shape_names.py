from __future__ import annotations

import torch
from torch import Tensor, nn

from tamis.shape_names import dimension_names, named, named_shape


class Twice(nn.Module):
    def forward(self, tokens: Tensor, mask: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return tokens.repeat(1, 2, 1), mask + other.sum()


def test_symbols_are_said_by_what_they_are() -> None:
    batch, length, free = (torch.export.Dim(name, min=2) for name in ("b", "n", "m"))
    example = torch.zeros(3, 5, 8), torch.zeros(3, 5), torch.zeros(4)
    program = torch.export.export(
        Twice(), example, dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}, {0: free})
    )
    assert list(dimension_names(program).values()) == ["batch", "sequence", "batch_2"]
    doubled, _ = (node.meta["val"] for node in program.graph.output_node().args[0])
    assert named_shape(doubled, program) == "f32[batch, 2*sequence, 8]"
    symbol = str(doubled.shape[0])
    assert named(f"size {symbol} is not s999", program) == "size batch is not s999"
    assert named_shape((torch.zeros(2),), program) == "(f32[2])"
