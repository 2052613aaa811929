"""Rows of [batch * tokens, channels] keep their axes from end to end, where nothing else reads them flat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tamis.capture.canonical import canonicalise
from tamis.capture.export import export_module
from tamis.graph import op_name


class Block(nn.Module):
    """x [B, N, 8] and what `rows` makes of it as [B * N, 8]."""

    def __init__(self, rows: Callable[..., Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 8, generator=generator))
        self.rows = rows
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.rows(x.reshape(-1, 8), self.weight, (*x.shape[:2], 8))


def graph_of(rows: Callable[..., Any]) -> fx.Graph:
    """The canonical graph, checked at other batches against the function; the reshapes left in it are counted."""
    model = Block(rows)
    program = canonicalise(export_module(model, example(2)))
    for batch in (1, 3):
        got, expected = program.module()(example(batch)[0]), model(*example(batch))
        torch.testing.assert_close(got, expected)
    return program.graph


def example(batch: int) -> tuple[Tensor]:
    return (torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(batch)),)


def reshapes(graph: fx.Graph) -> int:
    return sum(op_name(node) in ("reshape", "view", "flatten") for node in graph.nodes if node.op == "call_function")


def mlp(rows: Tensor, weight: Tensor) -> Tensor:
    return rows + nn.functional.linear(nn.functional.layer_norm(rows, (8,)).relu(), weight)


UNFOLDED: dict[str, Callable[..., Any]] = {
    "a block": lambda rows, weight, shape: mlp(rows, weight).view(shape),
    "two blocks": lambda rows, weight, shape: mlp(mlp(rows, weight), weight).view(shape),
    "set apart twice": lambda rows, weight, shape: (lambda y: y.view(shape) + y.relu().view(shape))(mlp(rows, weight)),
    "scaled by channel": lambda rows, weight, shape: (rows * weight[0] + 1).view(shape),
}
# What is read flat needs its reshape, and so does what is made of it; a norm over rows reads them before the region.
KEPT: dict[str, tuple[Callable[..., Any], int]] = {
    "read flat too": (lambda rows, weight, shape: (lambda y: (y.view(shape), y.sum(0)))(mlp(rows, weight)), 2),
    "rows mixed": (lambda rows, weight, shape: rows.cumsum(0).view(shape), 2),
    "norm over rows": (lambda rows, weight, shape: (rows / rows.norm(dim=0)).view(shape), 1),
}


@pytest.mark.parametrize("name", UNFOLDED)
def test_unfolded(name: str) -> None:
    graph = graph_of(UNFOLDED[name])
    assert reshapes(graph) == 0
    assert all(n.meta["val"].dim() == 3 for n in graph.nodes if op_name(n) in ("linear", "layer_norm", "add", "mul"))


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    rows, left = KEPT[name]
    assert reshapes(graph_of(rows)) == left
