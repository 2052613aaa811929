"""Writes in place: what a captured graph computes is in its arguments, so that rewriting it changes nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import draw

from tamis.capture import capture
from tamis.capture.export import export_module
from tamis.capture.mutations import without_shared_writes
from tamis.rewrite import Pipeline

TOKENS, CHANNELS, HEADS = 12, 16, 2


class Block(nn.Module):
    """Attention over [B, 12, 16] that writes as `kind` says: into the mask, the logits, the tokens, or nowhere."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 48), nn.Linear(CHANNELS, CHANNELS)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], TOKENS, 3, HEADS, CHANNELS // HEADS)
        q, k, v = self.qkv(self.norm(x)).reshape(shape).permute(2, 0, 3, 1, 4)
        if self.kind == "mask":
            mask = torch.full((TOKENS, TOKENS), float("-inf"), dtype=x.dtype)
            mask[:5, :5] = 0
            mask[5:, 5:] = 0
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            logits = q @ k.transpose(-1, -2) * (CHANNELS // HEADS) ** -0.5
            if self.kind == "logits":
                logits[:] = logits + torch.arange(TOKENS, dtype=x.dtype)
            y = logits.softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        if self.kind == "tokens":
            x = x.clone()
            x[:, 3:6] = 0
        return nn.functional.relu_(x * 2) if self.kind == "nowhere else" else x


class Blocks(nn.Sequential):
    """Two blocks and a norm."""

    def __init__(self, kind: str) -> None:
        super().__init__(Block(kind), Block(kind), nn.LayerNorm(CHANNELS))


def tokens(batch: int) -> Tensor:
    return torch.randn(batch, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)


def model(kind: str) -> nn.Module:
    return draw(Blocks(kind)).eval().double()


@pytest.mark.parametrize("kind", ["mask", "logits", "tokens", "nowhere else"])
def test_the_captured_program_computes_the_same(kind: str) -> None:
    module = model(kind)
    graph = capture(module, (tokens(2),))
    with torch.no_grad():
        for batch in (1, 3):
            torch.testing.assert_close(graph.program.module()(tokens(batch)), module(tokens(batch)))
    assert graph.sites[0].mask.kind == ("bias" if kind in ("mask", "logits") else "full")


@pytest.mark.parametrize("kind", ["mask", "logits", "tokens"])
def test_no_write_is_left(kind: str) -> None:
    graph = capture(model(kind), (tokens(2),))
    assert not [n.name for n in graph.graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False)]


def test_a_write_that_nothing_else_sees_is_left_alone() -> None:
    program = export_module(model("nowhere else"), (tokens(2),), {}, name="m")
    assert without_shared_writes(program) is program


def test_tokens_that_were_overwritten_stay_so_after_merging() -> None:
    """Without this the zeros would be written into a copy that is thrown away."""
    result = Pipeline.parse("tome:r=2,layers=[0]").run(capture(model("tokens"), (tokens(2),)))
    with torch.no_grad():
        written = result.graph.program.module()(tokens(2))[:, 3:6]
    bias = model("tokens")[2].bias
    torch.testing.assert_close(written, bias.expand_as(written))
