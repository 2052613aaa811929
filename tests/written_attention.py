"""Attention written out in many ways, and the canonical graph of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from tamis.capture.canonical import canonicalise
from tamis.capture.export import export_module

SDPA = torch.ops.aten.scaled_dot_product_attention.default
HEADS = 2


class Attention(nn.Module):
    """Queries, keys and values [B, 2, N, 4] of x [B, N, 24], and a written-out attention on them."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        super().__init__()
        self.attend = attend
        self.eval()

    def forward(self, x: Tensor) -> Any:
        batch, tokens, _ = x.shape
        q, k, v = x.reshape(batch, tokens, 3, HEADS, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(q, k, v)


def example(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 5, 24, generator=torch.Generator().manual_seed(batch)).to(dtype)


def captured(attend: Callable[..., Any], dtype: torch.dtype = torch.float32, tolerance: float = 1e-6) -> fx.Graph:
    """The canonical graph, checked at batches 1 and 3 against the function."""
    model = Attention(attend)
    program = canonicalise(export_module(model, example(2, dtype)))
    for batch in (1, 3):
        x = example(batch, dtype)
        torch.testing.assert_close(program.module()(x), model(x), rtol=tolerance, atol=tolerance)
    return program.graph


def attentions(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is SDPA]


def hidden(n: int = 5) -> Tensor:
    """A causal mask, true where keys are hidden."""
    return torch.ones(n, n).triu(1).bool()


BIAS = torch.randn(1, HEADS, 5, 5, generator=torch.Generator().manual_seed(9))


def fold(x: Tensor) -> Tensor:
    """[B, 2, N, D] -> [B * 2, N, D]."""
    return x.reshape(-1, *x.shape[2:])


def repeated(bias: Tensor, like: Tensor) -> Tensor:
    return bias.expand(like.shape[0], -1, -1, -1)


def unfold(x: Tensor) -> Tensor:
    return x.reshape(-1, HEADS, *x.shape[1:])


def outside(x: Tensor) -> Tensor:
    """[B, 2, N, D] -> [2 * B, N, D]."""
    return x.transpose(0, 1).reshape(-1, *x.shape[2:])
