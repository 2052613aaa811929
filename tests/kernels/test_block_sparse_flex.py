"""block_sparse_attention compiled for a CPU: blocks that are visited, and FlexAttention over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code

from tamis.kernels.block_sparse_flex import RUNS, visited, why_not
from tamis.kernels.sparse_pairs import Pairs, gathered
from tamis.lowering.callables import lower
from tamis.lowering.inline import place_compiled
from tamis.op import OPS
from tamis.target import Target

OP = OPS["block_sparse_attention"]
KERNEL = "int64_t num_kviStrideB ="  # once in the source of each of FlexAttention's kernels
NOTHING = Pairs(None, None, None, None, "kv", 16, 1, 0, 0, 0, 0, True)
TILES = replace(NOTHING, tiles=torch.zeros(1, 1, 1, 1, dtype=torch.int32), width=16, aligned=True)


def drawn_tiles(tokens: int, rows: int, width: int, seed: int = 0) -> Tensor:
    """[2, 2, R, T] of which half are used."""
    generator = torch.Generator().manual_seed(seed)
    count, blocks = -(-tokens // rows), -(-tokens // width)
    used = torch.rand(2, 2, count, blocks, generator=generator) < 0.5
    starts = torch.where(used, torch.arange(blocks) * width, tokens).sort(-1).values
    return torch.where(starts < tokens, starts, -1).int()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize(
    "parts",
    [
        {"rows": 16, "width": 16},
        {"rows": 32, "width": 16},
        {"rows": 16, "width": 32},
        {"rows": 16, "sink": 5},
        {"rows": 16, "local": 1},
        {"rows": 16, "local": 37, "sink": 20},
    ],
)
def test_blocks_are_those_that_hold_a_pair_and_whole_ones_those_that_hold_all(
    parts: dict[str, int], window: int, causal: bool
) -> None:
    tokens, rows, tiled = 101, parts["rows"], "width" in parts
    index = replace(NOTHING, **parts, window=window, causal=causal)
    if tiled:
        index = replace(index, tiles=drawn_tiles(tokens, rows, index.width), aligned=True)
    width = index.width if tiled else rows
    places, seen = gathered(index, tokens, 2, 2, torch.device("cpu"))
    batch, count, blocks = len(places), -(-tokens // rows), -(-tokens // width)
    read = torch.zeros(batch, 2, count, rows, blocks * width)
    places, seen = (x.expand(batch, 2, *x.shape[2:]) for x in (places, seen))
    read.scatter_add_(4, places.unsqueeze(3).expand(seen.shape), seen.float())
    real = torch.arange(count * rows).reshape(count, rows, 1) < tokens
    read = ((read > 0) & real).unflatten(4, (blocks, width))
    needed = real.unsqueeze(-1) & (torch.arange(blocks * width) < tokens).unflatten(0, (blocks, width))
    part, whole = (x.expand(batch, 2, -1, -1) for x in visited(index, tokens, width))
    assert not (part & whole).any()
    assert (part | whole).shape[2:] == (count, blocks)
    assert (part | whole)[read.any(5).any(3)].all()
    if not ("sink" in parts and window):  # a window may leave nothing of a block that begins with sinks
        assert torch.equal(part | whole, read.any(5).any(3))
    assert (read | ~needed).all(5).all(3)[whole].all()
    if tiled:  # of parts that join, only what one of them holds whole is known to be
        assert torch.equal(whole, (read | ~needed).all(5).all(3) & read.any(5).any(3))


class Calls(nn.Module):
    """Layers that call the op, each with its index, over the tiles and lengths that they are given."""

    def __init__(self, layers: list[Pairs], softcap: float) -> None:
        super().__init__()
        self.layers, self.softcap = layers, softcap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, lengths: Tensor) -> list[Tensor]:
        return [OP.call(q, k, v, *self.given(index, tiles, lengths)) for index in self.layers]

    def given(self, index: Pairs, tiles: Tensor, lengths: Tensor) -> list[Any]:
        lists = [tiles if index.tiles is not None else None, None, None, lengths if index.causal else None, index.share]
        numbers = [index.rows, index.width, index.sink, index.local, index.first, index.last, 0.3, index.causal]
        return [*lists, *numbers, self.softcap if index.window else None, index.window, index.aligned]


def prompt(batch: int, tokens: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, tokens, heads, 8, generator=generator).transpose(1, 2) for heads in (4, 2, 2))
    tiles = drawn_tiles(tokens, 16, 16, seed)[:1].expand(batch, -1, -1, -1).contiguous()
    lengths = torch.tensor([tokens, tokens // 3, 1][:batch])
    return q, k, v, tiles, lengths


WINDOWS = replace(NOTHING, sink=3, local=20, window=30)
LAYERS = [replace(TILES, first=1, last=2), WINDOWS, replace(WINDOWS, causal=False), WINDOWS]


def test_compiled_once_for_layers_alike_it_is_the_reference_at_any_batch_and_length() -> None:
    module = Calls(LAYERS, 1.5)
    batch, length, rows = (torch.export.Dim(name, min=2) for name in ("batch", "length", "rows"))
    inputs = {0: batch, 2: length}
    shapes = (inputs, inputs, inputs, {0: batch, 2: rows, 3: rows}, {0: batch})
    program = torch.export.export(module, prompt(2, 100, 0), dynamic_shapes=shapes)
    compiled = lower(program, Target.parse("cpu"), "default")
    _, codes = run_and_get_code(compiled, *prompt(2, 100, 0))
    assert "".join(codes).count(KERNEL) == (3 if RUNS else 0)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed, (batches, tokens) in enumerate(((2, 100), (3, 65), (2, 208))):
        given = prompt(batches, tokens, seed)
        wide = [x.double() for x in given[:3]]
        for index, got in zip(LAYERS, compiled(*given), strict=True):
            expected = OP.reference(*wide, *module.given(index, *given[3:]))
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_compiled_for_one_token() -> None:
    module, given = Calls(LAYERS, 1.5), prompt(2, 1, 0)
    compiled = lower(torch.export.export(module, given), Target.parse("cpu"), "default")
    for index, got in zip(LAYERS, compiled(*given), strict=True):
        torch.testing.assert_close(got, OP.reference(*given[:3], *module.given(index, *given[3:])))


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [(torch.float16, "max-autotune"), pytest.param(torch.bfloat16, "default", marks=pytest.mark.full)],
)
def test_one_key_head_in_half_precision(dtype: torch.dtype, mode: str) -> None:
    """Within two units in the last place of the largest output."""
    q, k, v, tiles, lengths = prompt(2, 100, 0)
    given = (q.to(dtype), k[:, :1].to(dtype), v[:, :1].to(dtype), tiles[:, :1].contiguous(), lengths)
    module = Calls([TILES, WINDOWS], 1.5)
    compiled = lower(torch.export.export(module, given), Target.parse("cpu"), mode)
    outs, codes = run_and_get_code(compiled, *given)
    assert "".join(codes).count(KERNEL) == (2 if RUNS else 0)
    for index, got in zip([TILES, WINDOWS], outs, strict=True):
        expected = OP.reference(*(x.double() for x in given[:3]), *module.given(index, *given[3:]))
        room = 2 * torch.finfo(dtype).eps * expected.abs().max().item()
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=room)


def test_what_it_does_not_take() -> None:
    q = torch.zeros(1, 2, 3, 4)
    column = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    assert why_not(q, TILES) == why_not(q, replace(NOTHING, local=4)) == ""
    for index, reason in (
        (replace(TILES, columns=column), "one by one"),
        (replace(TILES, positions=column[0]), "another order"),
        (replace(TILES, aligned=False), "start anywhere"),
        (replace(TILES, width=8), "keys wide"),
        (replace(TILES, sink=1), "beside them"),
        (replace(TILES, local=1), "beside them"),
        (replace(TILES, lengths=column[0, 0, 0], causal=False), "padding"),
    ):
        assert reason in why_not(q, index), index
    assert "type" in why_not(q.double(), TILES)
    assert "one query" in why_not(q[:, :, :1], TILES)


class Fused(nn.Module):
    """Queries, keys and values are views of one tensor, and what follows is pointwise."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x * 2).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return q + OP.call(q, k, v, None, None, None, None, "layer", 16, 1, 0, 20, 0, 0, 0.3, True)


def test_views_of_one_tensor_before_and_arithmetic_behind() -> None:
    x = torch.randn(2, 50, 48, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Fused(), (x,), dynamic_shapes=({1: torch.export.Dim("length", min=17)},))
    got = lower(program, Target.parse("cpu"), "default")(x)
    torch.testing.assert_close(got, Fused()(x), rtol=1e-4, atol=1e-5)


def test_what_is_called_as_before_is_left_as_it_is() -> None:
    """Views are copied for the kernel alone."""
    graphs = []
    for rows in (16, 8):  # without tiles a block is a row
        graph = fx.Graph()
        parts = [graph.call_function(torch.ops.aten.alias.default, (graph.placeholder(name),)) for name in "qkv"]
        tiles = graph.placeholder("tiles") if rows == 8 else None
        graph.call_function(OP.call, (*parts, tiles, None, None, None, "kv", rows, rows, 0, 0, 0, 0, 0.3, True))
        graphs.append(graph)
    assert [place_compiled(graph) for graph in graphs] == [True, False]
    copies = [sum(node.target is torch.ops.aten.clone.default for node in graph.nodes) for graph in graphs]
    assert copies == [3, 0]
    assert [any(node.target is OP.call for node in graph.nodes) for graph in graphs] == [False, True]
