"""Key-value heads repeated for groups of query heads, found by what the repetition does, however it is spelled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tamis.capture.canonical import canonicalise
from tamis.capture.export import export_module
from tamis.capture.sites import find_sites

HEADS, SHARED, WIDTH = 6, 2, 4


class Grouped(nn.Module):
    """Attention of 6 query heads on 2 key-value heads that `repeat` makes 6, on x [B, N, 40]."""

    def __init__(self, repeat: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.repeat = repeat
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        heads = x.reshape(*x.shape[:2], HEADS + 2 * SHARED, WIDTH).transpose(1, 2)
        q, k, v = heads.split([HEADS, SHARED, SHARED], 1)
        return scaled_dot_product_attention(q, self.repeat(k), self.repeat(v), is_causal=True)


def expanded(x: Tensor) -> Tensor:
    batch, heads, tokens, width = x.shape
    return x[:, :, None].expand(batch, heads, HEADS // SHARED, tokens, width).reshape(batch, HEADS, tokens, width)


def tiled(x: Tensor) -> Tensor:
    return x.repeat(1, HEADS // SHARED, 1, 1)  # query head h would read key head h % 2


GROUPED: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": expanded,
    "interleaved": lambda x: x.repeat_interleave(HEADS // SHARED, 1),
    "stacked": lambda x: x.unsqueeze(2).repeat(1, 1, HEADS // SHARED, 1, 1).flatten(1, 2),
    "one head": lambda x: x[:, :1].expand(-1, HEADS, -1, -1),
}
OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "tiled": tiled,
    "turned": lambda x: expanded(x).flip(1),
    "scaled": lambda x: expanded(x) * torch.arange(1.0, HEADS + 1).reshape(HEADS, 1, 1),
}


def sites_of(repeat: Callable[[Tensor], Tensor]) -> list[tuple[int, int]]:
    """(query heads, key-value heads) of the canonical graph, which is checked at other sizes against the module."""
    model = Grouped(repeat)
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = canonicalise(export_module(model, (example(2, 5),), dynamic_shapes=(sizes,)))
    for x in (example(3, 9), example(4, 2)):
        torch.testing.assert_close(program.module()(x), model(x))
    return [(site.heads, site.kv_heads) for site in find_sites(program)]


def example(batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, tokens, (HEADS + 2 * SHARED) * WIDTH, generator=generator)


@pytest.mark.parametrize("name", GROUPED)
def test_repeated_heads_are_shared(name: str) -> None:
    assert sites_of(GROUPED[name]) == [(HEADS, 1 if name == "one head" else SHARED)]


@pytest.mark.parametrize("name", OTHER)
def test_other_arrangements_are_kept(name: str) -> None:
    assert sites_of(OTHER[name]) == [(HEADS, HEADS)]
