"""Token-axis rules on whole modules.

Heads: what follows a merged trunk must equal the head run on the trunk's restored output, whatever the head reads.
Side inputs: with random drop the later layers must equal the dense layers on the surviving tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zoo import draw

from tamis.capture import capture
from tamis.errors import TokenAxisUnsupported
from tamis.graph import TokenGraph
from tamis.rewrite import Pipeline

GRID, CHANNELS, HEADS = 6, 24, 2
TOKENS = GRID * GRID + 1


ROTATED_PATCHES = ("rotate a slice", "rotate a piece", "rotate a chunk")


def rotate_patches(x: Tensor, table: Tensor, how: str) -> Tensor:
    """Rotate all tokens [B, H, N, D] but the first; three ways to cut them apart."""
    if how == "rotate a slice":
        first, rest = x[:, :, :1], x[:, :, 1:]
    elif how == "rotate a piece":
        first, rest = x.split([1, x.shape[2] - 1], 2)
    else:
        nothing, first, rest = x.split([0, 1, x.shape[2] - 1], -2)
        first = torch.cat([nothing, first], -2)
    return torch.cat([first, rest * table + rest.flip(-1)], 2)


class Block(nn.Module):
    """A pre-norm block that may rotate queries and keys, add a bias to the logits, or scale tokens by position."""

    def __init__(self, side: str = "") -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.up, self.down = nn.Linear(CHANNELS, 48), nn.Linear(48, CHANNELS)
        self.side = side
        generator = torch.Generator().manual_seed(3)
        size = CHANNELS // HEADS
        shape = {"rotate": (TOKENS, size), "bias": (HEADS, TOKENS, TOKENS), "scale": (TOKENS, CHANNELS)}
        shape |= dict.fromkeys(ROTATED_PATCHES, (TOKENS - 1, size))
        self.table: Tensor
        self.register_buffer("table", torch.randn(shape.get(side, (1,)), generator=generator))

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        table = self.table if table is None else table
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        if self.side == "rotate":
            q, k = q * table + q.flip(-1), k * table + k.flip(-1)
        if self.side in ROTATED_PATCHES:
            q, k = (rotate_patches(t, table, self.side) for t in (q, k))
        mask = table if self.side == "bias" else None
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, c))
        y = self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return x + (y * table if self.side == "scale" else y)


class Trunk(nn.Module):
    """A small ViT whose end is `head`."""

    def __init__(self, head: Callable[[Tensor], Tensor], side: str = "") -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, CHANNELS, 4, 4)
        self.first = nn.Parameter(torch.zeros(1, 1, CHANNELS))
        self.position = nn.Parameter(torch.zeros(1, TOKENS, CHANNELS))
        self.blocks = nn.ModuleList([Block(side) for _ in range(3)])
        self.head = head

    def embed(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.position

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 24, 24, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)


def trunk(head: Callable[[Tensor], Tensor], side: str = "") -> tuple[Trunk, TokenGraph]:
    model = draw(Trunk(head, side)).eval().double()
    return model, capture(model, (images(2),))


def run(graph: TokenGraph, recipe: str, batch: int, **options: bool) -> Tensor:
    program = Pipeline.parse(recipe).run(graph, **options).graph.program
    with torch.no_grad():
        return program.module()(images(batch))


def conv_over_grid(x: Tensor) -> Tensor:
    grid = x[:, 1:].transpose(1, 2).reshape(x.shape[0], CHANNELS, GRID, GRID)
    return nn.functional.avg_pool2d(grid, 3, 2)


def attention_pooling(x: Tensor) -> Tensor:
    return x[:, :, :1].softmax(1).transpose(1, 2) @ x


HEADS_THAT_POOL: dict[str, Callable[[Tensor], Tensor]] = {
    "class token": lambda x: x[:, 0],
    "tokens themselves": lambda x: x,
    "patch tokens": lambda x: x[:, 1:],
    "mean": lambda x: x.mean(1),
    "mean of patches": lambda x: x[:, 1:].mean(1, keepdim=True),
    "class and mean": lambda x: torch.cat([x[:, 0], x[:, 1:].mean(1)], -1),
    "sum over a constant": lambda x: x[:, 1:].sum(1) / (TOKENS - 1),
    "maximum": lambda x: x.amax(1),
    "softmax over tokens": lambda x: (x.softmax(1) * x).sum(1),
    "attention pooling": attention_pooling,
    "neighbour difference": lambda x: (x[:, 1:] - x[:, :-1]).abs().mean(1),
    "gather by index": lambda x: x[torch.arange(x.shape[0]), torch.full((x.shape[0],), 7)],
    "grid": conv_over_grid,
    "flattened with the batch": lambda x: x.reshape(-1, CHANNELS).tanh().reshape(x.shape[0], TOKENS, CHANNELS).mean(1),
    "variance": lambda x: x.var(1),
    "cumulative sum": lambda x: x.cumsum(1)[:, 0],
    "norm over channels": lambda x: nn.functional.normalize(x, dim=-1).mean(1),
    "gram matrix": lambda x: (x @ x.transpose(1, 2)).mean(2),
    "permuted": lambda x: x.permute(2, 0, 1).mean(0),
    "stacked": lambda x: torch.stack([x, x * 2], 1).mean(1),
    "split channels": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "norm over tokens": lambda x: x.norm(dim=1),
    "flipped channels": lambda x: x.flip(-1).mean(1),
    "class token set apart and back": lambda x: torch.cat([x[:, :1] * 3, x[:, 1:].tanh()], 1).mean(1),
    "class token replaced": lambda x: torch.cat([x.new_ones(x.shape[0], 1, CHANNELS), x[:, 1:]], 1),
    "class token split off": lambda x: x.split([1, TOKENS - 1], 1)[1].mean(1) + x.split([1, TOKENS - 1], 1)[0][:, 0],
}


@pytest.mark.parametrize("name", HEADS_THAT_POOL)
def test_a_head_sees_the_restored_sequence(name: str) -> None:
    head = HEADS_THAT_POOL[name]
    _, graph = trunk(head)
    _, plain = trunk(HEADS_THAT_POOL["tokens themselves"])
    for batch in (1, 3):
        expected = head(run(plain, "tome:r=5", batch))
        torch.testing.assert_close(run(graph, "tome:r=5", batch), expected, rtol=1e-9, atol=1e-9)


ONLY_WITH_ALL_TOKENS = ["sum over a constant", "softmax over tokens", "neighbour difference", "gather by index", "grid"]


@pytest.mark.parametrize("name", ONLY_WITH_ALL_TOKENS)
def test_a_head_that_needs_dropped_tokens_is_refused(name: str) -> None:
    _, graph = trunk(HEADS_THAT_POOL[name])
    with pytest.raises(TokenAxisUnsupported, match="dropped some for good"):
        run(graph, "random:r=5", 2)


ALSO_AFTER_DROPPING = ["class token", "mean", "norm over channels", "flipped channels", "split channels", "stacked"]
ALSO_AFTER_DROPPING += ["class token set apart and back", "class token split off"]


@pytest.mark.parametrize("name", ALSO_AFTER_DROPPING)
def test_a_head_that_asks_for_no_dropped_token_is_accepted(name: str) -> None:
    model, graph = trunk(HEADS_THAT_POOL[name])
    assert run(graph, "random:r=5", 2).shape == model(images(2)).shape


def kept_by_random(layer: int, tokens: int, r: int) -> Tensor:
    """Positions that survive, from the definition: highest hash first, ties to the lowest index, original order."""
    from tamis.kernels.hash_scores import hash_scores

    scores = hash_scores(torch.arange(tokens), 0, layer).tolist()
    order = sorted(range(1, tokens), key=lambda i: (-scores[i], i))[: tokens - 1 - r]
    return torch.tensor([0, *sorted(order)])


@pytest.mark.parametrize("side", ["", "rotate", "bias", "scale", *ROTATED_PATCHES])
def test_side_inputs_follow_the_tokens(side: str) -> None:
    r = 9
    model, graph = trunk(lambda x: x.mean(1), side)
    kept = kept_by_random(0, TOKENS, r)
    x = images(2)
    with torch.no_grad():
        whole = model.embed(x)
        after_attention = whole + attention_branch(model.blocks[0], whole)
        stream = after_attention[:, kept]
        first = model.blocks[0]
        y = first.down(nn.functional.gelu(first.up(first.norm2(stream))))
        stream = stream + (y * first.table[kept] if side == "scale" else y)
        for block in list(model.blocks)[1:]:
            stream = block(stream, reduced_table(block.table, side, kept))
    torch.testing.assert_close(run(graph, f"random:r={r},layers=[0]", 2), stream.mean(1), rtol=1e-9, atol=1e-9)


def attention_branch(block: Block, x: Tensor) -> Tensor:
    """What the block's attention adds, from the block itself with its MLP silenced."""
    silent = Block(block.side).double()
    silent.load_state_dict(block.state_dict())
    nn.init.zeros_(silent.down.weight)
    nn.init.zeros_(silent.down.bias)
    return silent(x) - x


def reduced_table(table: Tensor, side: str, kept: Tensor) -> Tensor:
    if side == "bias":
        return table[:, kept][:, :, kept]
    if side in ROTATED_PATCHES:
        return table[kept[1:] - 1]
    return table[kept] if side else table


@pytest.mark.parametrize("side", ROTATED_PATCHES)
@pytest.mark.parametrize("recipe", ["tome:r=5", "random:r=5"])
def test_attention_whose_patches_are_rotated_runs_at_the_reduced_length(side: str, recipe: str) -> None:
    _, graph = trunk(lambda x: x.mean(1), side)
    result = Pipeline.parse(recipe).run(graph).graph
    queries = [n.args[0].meta["val"].shape for n in result.graph.nodes if "attention" in str(n.target)]
    assert [shape[2] for shape in queries] == [TOKENS, TOKENS - 5, TOKENS - 10]


REFUSED_SEGMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "cut behind the prefix": lambda x: torch.cat([x[:, :3], x[:, 3:] * 2], 1).mean(1),
    "split behind the prefix": lambda x: torch.cat([t * 2 for t in x.split([1, 2, TOKENS - 3], 1)], 1).mean(1),
    "order changed": lambda x: torch.cat([x[:, 1:], x[:, :1]], 1).mean(1),
    "a token more": lambda x: torch.cat([x[:, :1], x], 1).mean(1),
    "patches twice": lambda x: torch.cat([x[:, 1:], x[:, 1:]], 1).mean(1),
    "halves": lambda x: x[:, 1:].chunk(2, 1)[0].mean(1),
}


@pytest.mark.parametrize("name", REFUSED_SEGMENTS)
def test_a_segment_that_is_not_all_behind_the_prefix_needs_every_token(name: str) -> None:
    head = REFUSED_SEGMENTS[name]
    _, graph = trunk(head)
    _, plain = trunk(HEADS_THAT_POOL["tokens themselves"])
    with pytest.raises(TokenAxisUnsupported, match="dropped some for good"):
        run(graph, "random:r=5", 2)
    expected = head(run(plain, "tome:r=5", 3))
    torch.testing.assert_close(run(graph, "tome:r=5", 3), expected, rtol=1e-9, atol=1e-9)


class GridBetween(Trunk):
    """A trunk with a depthwise convolution over the grid between its layers."""

    def __init__(self) -> None:
        super().__init__(lambda x: x[:, 0])
        self.mix = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
            grid = x[:, 1:].transpose(1, 2).reshape(x.shape[0], CHANNELS, GRID, GRID)
            x = x + torch.cat([x[:, :1], self.mix(grid).flatten(2).transpose(1, 2)], 1)
        return self.head(x)


def test_a_convolution_inside_the_stream_sees_every_token_and_the_next_cut_reduces_again() -> None:
    model = draw(GridBetween()).eval().double()
    graph = capture(model, (images(2),))
    result = Pipeline.parse("tome:r=5,layers=[0,1]").run(graph)
    sizes = [tuple(n.meta["val"].shape) for n in result.graph.graph.nodes if "conv2d" in n.name][1:]
    assert [size[1:] for size in sizes] == [(CHANNELS, GRID, GRID)] * 3
    with torch.no_grad():
        out, dense = result.graph.program.module()(images(3)), model(images(3))
    assert 0 < float((out - dense).norm() / dense.norm()) < 0.5
    with pytest.raises(TokenAxisUnsupported):
        Pipeline.parse("random:r=5,layers=[0]").run(graph)


class EveryLayer(Trunk):
    """A trunk whose output is made of what every block gave, as DPT's is."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x, states = self.embed(images), []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        pooled = torch.stack([state.mean(1) for state in states], 1)
        return (*states, pooled, conv_over_grid(states[0]))


def test_what_earlier_layers_gave_is_restored_as_it_was_then() -> None:
    """Tokens that merged only afterwards keep what they were: each state equals that of a model that ends there."""
    graph = capture(draw(EveryLayer(lambda x: x)).eval().double(), (images(2),))
    with torch.no_grad():
        *states, pooled, grid = Pipeline.parse("tome:r=5").run(graph).graph.program.module()(images(2))
        for layer, state in enumerate(states):
            program = Pipeline.parse(f"tome:r=5,layers={list(range(layer + 1))}").run(graph).graph.program
            torch.testing.assert_close(state, program.module()(images(2))[layer], rtol=1e-9, atol=1e-9)
    assert not torch.equal(states[0], states[2])
    assert [len(state[0].unique(dim=0)) for state in states] == [TOKENS - 5, TOKENS - 10, TOKENS - 15]
    torch.testing.assert_close(pooled, torch.stack([state.mean(1) for state in states], 1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grid, conv_over_grid(states[0]), rtol=1e-9, atol=1e-9)


def test_a_head_may_read_every_token_of_a_layer_before_the_drop() -> None:
    graph = capture(draw(EveryLayer(lambda x: x)).eval().double(), (images(2),))
    with torch.no_grad():
        dense = graph.program.module()(images(2))
        reduced = Pipeline.parse("random:r=5,layers=[2]").run(graph).graph.program.module()(images(2))
    for index in (0, 1, 4):
        torch.testing.assert_close(reduced[index], dense[index], rtol=1e-9, atol=1e-9)
    with pytest.raises(TokenAxisUnsupported, match="dropped some for good"):
        Pipeline.parse("random:r=5,layers=[0]").run(graph)
