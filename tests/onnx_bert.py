"""BERT written by hand with the operations that transformers had up to version 4.47 and older exporters were fed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

VOCABULARY = 99
POSITIONS = 64


class Bert(nn.Module):
    """Token ids [B, N] with their mask -> states [B, N, C] and the pooled first one [B, C]."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(POSITIONS, width)
        self.types = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.pooler = nn.Linear(width, width)
        self.register_buffer("position_ids", torch.arange(POSITIONS).expand((1, -1)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        positions = self.position_ids[:, : input_ids.size(1)]
        types = torch.zeros(input_ids.size(), dtype=torch.long)
        x = self.norm(self.words(input_ids) + self.types(types) + self.positions(positions))
        mask = attention_mask[:, None, None, :].to(dtype=x.dtype)
        mask = (1.0 - mask) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, mask)
        return x, torch.tanh(self.pooler(x[:, 0]))


class Layer(nn.Module):
    """Attention and MLP, each followed by its norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.size)
        context = torch.matmul(torch.softmax(scores + mask, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        context = context.view((*context.size()[:-2], self.heads * self.size))
        x = self.attention_norm(self.output(context) + x)
        return self.norm(self.down(nn.functional.gelu(self.up(x))) + x)

    def split(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, H, N, D]."""
        return x.view((*x.size()[:-1], self.heads, self.size)).permute(0, 2, 1, 3)
