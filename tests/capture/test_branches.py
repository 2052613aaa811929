"""Sub-layers of all streams, by hand-written blocks of every kind."""

from __future__ import annotations

import pytest
import torch
from rewriting import captured
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from tamis.capture import capture
from tamis.capture.branches import find_branches

C, HEADS = 8, 2


class Attention(nn.Module):
    """Heads over [B, N, C]; keys and values from `context` where given."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x, context=None):
        given = (x, *(x if context is None else context for _ in "kv"))
        q, k, v = (
            layer(one).unflatten(-1, (HEADS, C // HEADS)).transpose(1, 2)
            for layer, one in zip((self.q, self.k, self.v), given, strict=True)
        )
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention and MLP, with the norm before each or behind it."""

    def __init__(self, post_norm: bool = False, leaks: bool = False, mixes: bool = False) -> None:
        super().__init__()
        self.post_norm, self.leaks = post_norm, leaks
        self.attention, self.cross = Attention(), Attention()
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(3))
        self.up, self.down = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.mix = nn.Conv1d(2 * C, 2 * C, 3, padding=1) if mixes else None

    def mlp(self, x):
        x = gelu(self.up(x))
        return self.down(x if self.mix is None else self.mix(x.transpose(1, 2)).transpose(1, 2))

    def forward(self, x, context):
        inside = []
        for norm, branch in zip(self.norms, (self.attention, lambda x: self.cross(x, context), self.mlp), strict=True):
            inside.append(branch(x if self.post_norm else norm(x)))
            x = norm(x + inside[-1]) if self.post_norm else x + inside[-1]
        return (x, inside[0] * 2) if self.leaks else x


def branches_of(block):
    graph = capture(block.eval(), (torch.randn(2, 6, C), torch.randn(2, 3, C)))
    return graph, find_branches(graph)


@pytest.mark.parametrize("post_norm", [False, True])
def test_the_sub_layers_of_a_block(post_norm):
    graph, found = branches_of(Block(post_norm))
    assert [(one.kind, one.site, one.block, one.reason) for one in found] == [
        ("self", 0, 0, ""),
        ("cross", 1, 0, ""),
        ("mlp", None, 0, ""),
    ]
    for one in found:
        entry = graph.node(one.entry)
        assert (one.entry == one.stream) == post_norm
        assert post_norm or str(entry.target) == "aten.layer_norm.default"
        assert str(graph.node(one.exit).target) == "aten.linear.default"


def test_what_is_read_outside_and_what_mixes_neighbours_says_so():
    _, (attention, *_) = branches_of(Block(leaks=True))
    assert attention.reason == ""  # its end is read, which has its full length
    _, (*_, mlp) = branches_of(Block(mixes=True))
    assert "mixes neighbours" in mlp.reason


def test_a_value_between_the_ends_that_is_read_outside():
    class Shows(Block):
        def forward(self, x, context):
            y = self.norms[0](x)
            q, k, v = (
                layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for layer in self.attention.children()
                if layer is not self.attention.out
            )
            seen = scaled_dot_product_attention(q, k, v)
            return x + self.attention.out(seen.transpose(1, 2).flatten(2)), seen.sum(1)

    _, (attention,) = branches_of(Shows())
    assert "read outside of it, by sum" in attention.reason


@pytest.mark.parametrize("name", ["vit_small", "hf_vit", "bert", "eva02"])
def test_layers_of_the_stream_are_blocks(name):
    graph = captured(name)
    found = [one for one in find_branches(graph) if one.kind == "self"]
    assert [one.site for one in found] == [layer.site for layer in graph.layers]
    assert [one.stream for one in found] == [layer.before_attention for layer in graph.layers]
    mlps = [one for one in find_branches(graph) if one.kind == "mlp"]
    assert [one.block for one in mlps] == [one.site for one in found]
    assert [one.stream for one in mlps] == [layer.after_attention for layer in graph.layers]
