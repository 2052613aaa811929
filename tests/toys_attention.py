"""Small hand-written blocks of attention for what no library has."""

from __future__ import annotations

from typing import Any

import torch
from family import draw
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

WIDTH, HEADS = 8, 2


class Attention(nn.Module):
    """Self-attention; where it `mixes`, neighbours are mixed in before."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1) if mixes else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.mix is None else self.mix(x.transpose(1, 2)).transpose(1, 2) * 2
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(mixes)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


class Blocks(nn.Module):
    """Two blocks, the first of which mixes neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(True), Block(False))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x * 1)


def mixing_block() -> tuple[Any, tuple[Tensor]]:
    """The two blocks in float64, and 3 x 16 tokens."""
    generator = torch.Generator().manual_seed(0)
    return draw(Blocks()).double().eval(), (torch.randn(3, 16, WIDTH, generator=generator, dtype=torch.float64),)
