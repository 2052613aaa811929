"""Sparse attention in captured decoders: at full budget they are the originals, at any length and padding."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from decoders import DECODERS, captured, prompt
from sparse_oracle import attended, expanded

import tamis
from tamis.attention_index import Heads
from tamis.errors import NothingChanged
from tamis.graph import TokenGraph
from tamis.passes.methods.a_shape import AShape
from tamis.passes.methods.block_sparse import BlockSparse
from tamis.passes.methods.vertical_slash import VerticalSlash
from tamis.rewrite import Pipeline, Result

METHODS = {
    "block-sparse": BlockSparse.full(1000),
    "vertical-slash": VerticalSlash.full(1000),
    "a-shape": AShape.full(1000),
}


@cache
def sparse(name: str, method: str) -> tuple[Any, Result]:
    model, graph = captured(name)
    return model, Pipeline.parse(METHODS[method]).run(graph, allow_noop=True)


def logits(program: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        out = program(**inputs)
    return out.logits if hasattr(out, "logits") else out[0]


def original(model: Any, inputs: Any) -> torch.Tensor:
    mask = inputs["attention_mask"]
    with torch.no_grad():
        return model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits


@pytest.mark.parametrize(("name", "method"), [(name, [*METHODS][i % 3]) for i, name in enumerate(DECODERS)])
def test_a_full_budget_is_the_original(name: str, method: str) -> None:
    model, result = sparse(name, method)
    assert [o.layer for o in result.outcomes if o.applied] == [*range(len(DECODERS[name].windows))]
    for batch, length, padding in ((3, 65, "mixed"), (1, 2, None), (3, 127, "mixed")):
        inputs = prompt(batch, length, padding)
        real = inputs["attention_mask"].bool()
        got = logits(result.graph.program.module(), inputs)
        torch.testing.assert_close(got[real], original(model, inputs)[real], rtol=1e-4, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("length", [1, 63, 64, 65, 129, 1000])
@pytest.mark.parametrize("name", [name for name, one in DECODERS.items() if one.rotary])
@pytest.mark.parametrize("method", METHODS)
def test_a_full_budget_is_the_original_at_every_length(name: str, method: str, length: int) -> None:
    model, result = sparse(name, method)
    inputs = prompt(3, length, "mixed")
    real = inputs["attention_mask"].bool()
    got = logits(result.graph.program.module(), inputs)
    torch.testing.assert_close(got[real], original(model, inputs)[real], rtol=1e-4, atol=1e-4)


def test_no_table_of_all_pairs_is_left() -> None:
    """Padding is read from the mask [B, N] that the model was given, not from the causal one made of it."""
    _, dense = captured("llama")
    _, result = sparse("llama", "a-shape")
    assert all_pairs(dense)
    assert not all_pairs(result.graph)


def all_pairs(graph: TokenGraph) -> list[str]:
    """Nodes with two axes of the sequence's length."""
    length = str(graph.node("input_ids").meta["val"].shape[1])
    shapes = {node.name: getattr(node.meta.get("val"), "shape", ()) for node in graph.graph.nodes}
    return [name for name, shape in shapes.items() if [str(size) for size in shape].count(length) > 1]


@pytest.mark.parametrize("length", [1, 63, 64, 129, 1000])
def test_lengths_around_a_tile(length: int) -> None:
    for method in METHODS:
        model, result = sparse("llama", method)
        inputs = prompt(3 if length < 1000 else 1, length, "mixed")
        real = inputs["attention_mask"].bool()
        got = logits(result.graph.program.module(), inputs)
        torch.testing.assert_close(got[real], original(model, inputs)[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "method", ["a-shape:sink=3,local=60", "sparge:threshold=1.0,block=8", "bigbird:block=4,random=9"]
)
def test_a_window_of_the_model_bounds_what_is_read(method: str) -> None:
    """A budget that covers the window and no more is dense: sinks, tiles and random ones outside it are not read."""
    model, graph = captured("mistral")
    program = Pipeline.parse(method).run(graph).graph.program.module()
    for length in (3, 40):
        inputs = prompt(2, length, "mixed")
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(logits(program, inputs)[real], original(model, inputs)[real], rtol=1e-4, atol=1e-4)


def test_a_method_with_no_window_within_the_models_says_so() -> None:
    _, graph = captured("mistral")
    with pytest.raises(NothingChanged, match=r"attention has a window of its own, \(4, 0\), and the method none"):
        Pipeline.parse("combiner:span=4").run(graph)


def layer_zero(model: Any, inputs: Any) -> Heads:
    """The heads of the first layer as the original computes them, rows without padding."""
    found: dict[str, Any] = {}

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
        if "q" not in found:
            found.update(q=query, k=key, v=value, scale=rest["scaling"])
        return torch.zeros_like(query).transpose(1, 2), None

    from transformers import AttentionInterface

    AttentionInterface.register("taken", attention)
    model.set_attn_implementation("taken")
    try:
        original(model, inputs)
    finally:
        model.set_attn_implementation("sdpa")
    return Heads(found["q"], found["k"], found["v"], None, found["scale"], True, None, 0, 2)


def test_a_small_budget_is_attention_over_the_index() -> None:
    """The first layer's output in the graph, against pairs written out from the heads of the original."""
    model, graph = captured("llama")
    method = BlockSparse(density=0.3, block=8, layers=[0])
    result = Pipeline.parse(method).run(graph)
    inputs = prompt(2, 61, None)
    heads = layer_zero(model, inputs)
    expected = attended(heads, expanded(method.index(heads), heads))
    found = attention_of(result.graph, inputs)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    dense = attended(heads)
    assert (dense - expected).norm() > 0.05 * dense.norm()


def attention_of(graph: TokenGraph, inputs: Any) -> torch.Tensor:
    """What the first sparse attention of a graph answers on some inputs."""
    seen: list[torch.Tensor] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            value = super().run_node(n)
            if n.target is torch.ops.tamis.block_sparse_attention.default:
                seen.append(value)
            return value

    with torch.no_grad():
        Watch(graph.program.module()).run(*inputs.values(), enable_io_processing=False)
    return seen[0]


CHOICES = (
    "vertical-slash:columns=6,slashes=5,sink=2,near=2,block=8,estimate=8",
    "pbs:block=4,segment=8,threshold=0.3,density=0.5",
    pytest.param("dilated:step=2,local=3,sink=2,first=1,near=4", marks=pytest.mark.full, id="dilated"),
)


@pytest.mark.parametrize("passes", CHOICES, ids=lambda text: text.split(":")[0])
def test_exported_files_choose_the_same(passes: str, tmp_path: Any) -> None:
    model, _ = captured("llama")
    inputs = prompt(2, 40, "left")
    fast = tamis.compile(model, kwargs=inputs, passes=passes)
    fast.export(tmp_path / "sparse.onnx")
    loaded = tamis.load(tmp_path / "sparse.onnx")
    other = prompt(3, 57, "mixed")
    real = other["attention_mask"].bool()
    torch.testing.assert_close(loaded(**other)["logits"][real], logits(fast, other)[real], rtol=1e-4, atol=1e-4)
