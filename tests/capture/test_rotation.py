"""Keys before rotary position embedding are found however the rotation is written, and only where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from zoo import draw

from tamis.capture import capture
from tamis.graph import TokenGraph
from tamis.passes.rotation import Turn

HEADS, SIZE, TOKENS = 2, 8, 6
WIDTH = HEADS * SIZE
Rotate = Callable[[Tensor], Tensor]


class Model(nn.Module):
    """Two attention layers that rotate queries and keys as [B, N, H, D] (`early`) or as [B, H, N, D]."""

    def __init__(self, rotate: Rotate, early: bool, normed: bool = False) -> None:
        super().__init__()
        self.rotate, self.early = rotate, early
        self.layers = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(WIDTH, WIDTH) for n in ("q", "k", "v", "out")}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.key_norm = nn.LayerNorm(SIZE) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            h = self.norm(x)
            q, k, v = (layer[name](h).reshape(*h.shape[:2], HEADS, SIZE) for name in "qkv")
            k = self.key_norm(k)
            if self.early:
                q, k = self.rotate(q), self.rotate(k)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            if not self.early:
                q, k = self.rotate(q), self.rotate(k)
            y = F.scaled_dot_product_attention(q, k, v)
            x = x + layer["out"](y.transpose(1, 2).reshape(x.shape))
        return x


def angles(early: bool, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    grid = torch.outer(torch.arange(tokens), 10.0 ** -torch.arange(SIZE // 2)).repeat(1, 2)
    grid = grid[:, None] if early else grid
    return grid.cos(), grid.sin()


def half(x: Tensor, early: bool) -> Tensor:
    cos, sin = angles(early)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def pairs(x: Tensor, early: bool) -> Tensor:
    cos, sin = angles(early)
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape) * sin


def partly(x: Tensor, early: bool) -> Tensor:
    """Only half of the channels turn."""
    cos, sin = (t[..., : SIZE // 2] for t in angles(early))
    turned, still = x.split(SIZE // 2, -1)
    return torch.cat([turned * cos + turned.flip(-1) * sin, still], -1)


def tail(x: Tensor, early: bool) -> Tensor:
    """All tokens but the first turn."""
    axis = 1 if early else 2
    cos, sin = angles(early, TOKENS - 1)
    first, rest = x.split([1, TOKENS - 1], axis)
    return torch.cat([first, rest * cos + rest.flip(-1) * sin], axis)


def as_complex(x: Tensor, early: bool) -> Tensor:
    cos, sin = (t[..., : SIZE // 2] for t in angles(early))
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(3)


def sites(rotate: Rotate, early: bool, normed: bool = False) -> tuple[TokenGraph, dict[str, Tensor], list[Tensor]]:
    """The graph, the value of every node, and for each site the keys before rotation by the model's own layers."""
    model = draw(Model(rotate, early, normed)).eval()
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    graph = capture(model, (x,))
    seen: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = seen[n.name] = super().run_node(n)
            return value

    constants = dict(graph.program.constants)
    values = [
        graph.program.state_dict.get(spec.target, constants.get(spec.target)) if spec.target else x
        for spec in graph.program.graph_signature.input_specs
    ]
    Recorder(graph.program.graph_module).run(*values)
    raw = []
    for i, layer in enumerate(model.layers):
        stream = seen[graph.layers[i].before_attention or ""]
        key = layer["k"](model.norm(stream)).reshape(2, TOKENS, HEADS, SIZE)
        raw.append(model.key_norm(key).transpose(1, 2))
    return graph, seen, raw


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("rotate", [half, pairs, partly, tail, as_complex])
def test_found(rotate: Callable[..., Tensor], early: bool, normed: bool) -> None:
    graph, seen, raw = sites(lambda x: rotate(x, early), early, normed)
    assert len(graph.sites) == 2
    for site, expected in zip(graph.sites, raw, strict=True):
        assert site.k_rotation
        torch.testing.assert_close(seen[site.k_rotation.before].permute(site.k_rotation.axes), expected)
        assert not torch.allclose(seen[site.k], expected, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("rotate", [half, pairs, partly, as_complex])
def test_rotated_to_other_positions(rotate: Callable[..., Tensor], early: bool, rows: int) -> None:
    """Token i as token place[i] would be: put there, rotated by the model's own function, and taken out again."""
    graph, seen, raw = sites(lambda x: rotate(x, early), early)
    values = {node: seen[node.name] for node in graph.graph.nodes if node.name in seen}
    place = torch.tensor([[3, 0, 0, 5, 2, 2], [1, 1, 4, 4, 0, 3]])[:rows]
    for site, x in zip(graph.sites, raw, strict=True):
        for rotation, name in ((site.k_rotation, site.k), (site.q_rotation, site.q)):
            assert rotation
            got = Turn.of(graph, rotation, name).at(values, x, place if rows == 2 else place[0])
            for b in range(2):
                for i, at in enumerate(place[b % rows].tolist()):
                    there = x[b : b + 1, :, i : i + 1].expand(-1, -1, TOKENS, -1)
                    turned = rotate(there.transpose(1, 2), True).transpose(1, 2) if early else rotate(there, False)
                    torch.testing.assert_close(got[b, :, i], turned[0, :, at])


def test_tables_without_a_row_for_each_token_rotate_nothing_elsewhere() -> None:
    graph, _, _ = sites(lambda x: tail(x, False), False)
    assert all(site.k_rotation and not site.k_rotation.tables for site in graph.sites)


NOT_ROTATED: dict[str, Rotate] = {
    "nothing": lambda x: x,
    "one scale for all tokens": lambda x: x * torch.linspace(1, 2, SIZE),
    "a scale per head": lambda x: x * torch.linspace(1, 2, HEADS)[:, None, None],
    "a position added": lambda x: x + angles(False)[0],
    "gated by content": lambda x: x * x.sigmoid(),
}


@pytest.mark.parametrize("name", NOT_ROTATED)
def test_not_rotated(name: str) -> None:
    graph, _, _ = sites(NOT_ROTATED[name], early=False)
    assert [(site.q_rotation, site.k_rotation) for site in graph.sites] == [(None, None)] * 2
