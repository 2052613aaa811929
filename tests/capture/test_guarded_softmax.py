"""Attention whose rows without any key are zero, as exporters write scaled_dot_product_attention; shared biases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tamis.capture import capture
from tamis.capture.canonical import canonicalise
from tamis.capture.export import export_module

SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Guarded(nn.Module):
    """softmax(q k^T + masks) v of x [B, 2, N, 4] as queries, keys and values; NaN probabilities become `instead`."""

    def __init__(self, masks: int = 1, instead: float = 0.0) -> None:
        super().__init__()
        self.masks, self.instead = masks, instead
        self.eval()

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        logits = x @ x.transpose(-2, -1) * 0.5
        for _ in range(self.masks):
            logits = logits + torch.where(seen, 0.0, -math.inf)
        probabilities = logits.softmax(-1)
        return torch.where(probabilities.isnan(), self.instead, probabilities) @ x


def example(batch: int) -> tuple[Tensor, Tensor]:
    """x, and which keys are seen: query 0 sees none."""
    x = torch.randn(batch, 2, 5, 4, generator=torch.Generator().manual_seed(batch))
    return x, torch.ones(5, 5).tril(-1).bool()


@pytest.mark.parametrize("masks", [1, 2])
def test_rows_without_any_key_stay_zero(masks: int) -> None:
    model = Guarded(masks)
    program = canonicalise(export_module(model, example(2)))
    assert [node.target for node in program.graph.nodes].count(SDPA) == 1
    assert not any(node.target is torch.ops.aten.isnan.default for node in program.graph.nodes)
    x, seen = example(3)
    result = program.module()(x, seen)
    assert bool((result[:, :, 0] == 0).all())
    torch.testing.assert_close(result, model(x, seen), rtol=1e-6, atol=1e-6)


def test_another_value_than_zero_is_not_attention() -> None:
    program = canonicalise(export_module(Guarded(instead=1.0), example(2)))
    assert SDPA not in [node.target for node in program.graph.nodes]


class SharedBias(nn.Module):
    """One pre-norm attention layer and an MLP, all linear layers with the same bias: files keep equal weights once."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(8))
        self.weights = nn.ParameterList(torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.weights
        x = x @ first + self.bias
        q = (nn.functional.layer_norm(x, [8]) @ second + self.bias).unflatten(-1, (2, 4)).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        x = x + (attended @ third + self.bias)
        return x + (nn.functional.layer_norm(x, [8]) @ first + self.bias).relu()


def test_a_shared_bias_is_not_taken_for_the_residual() -> None:
    graph = capture(SharedBias(), torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)))
    assert [site.role for site in graph.sites] == ["stream"]
    (layer,) = graph.layers
    assert layer.after_attention is not None
    assert layer.after_block is not None
