"""Routing: centroids from a file, some heads routed, others local; the op by its definition; ONNX files of its kin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pooled_oracle as oracle
import pytest
import torch
from decoders import captured, prompt
from pooled_oracle import mixed, model_by_hand
from safetensors.torch import save_file
from sparse_oracle import attended, drawn, expanded
from test_sparse_decoders import logits
from torch import Tensor

import tamis
from tamis.attention_index import Heads
from tamis.passes.methods.a_shape import AShape
from tamis.passes.methods.combiner import CCA, Combiner
from tamis.passes.methods.dilated import Dilated
from tamis.passes.methods.landmark import Landmark
from tamis.passes.methods.routing import Routing
from tamis.rewrite import Pipeline
from tamis.weight_errors import WeightsMismatch

LOCAL = AShape(sink=0, local=6, layers=[1])


def centroids(heads: int, layers: tuple[int, ...] = (1,)) -> dict[str, Tensor]:
    """Three for every head, of unit length; the model's heads have 12 channels."""
    generator = torch.Generator().manual_seed(5)
    made = {f"layers.{layer}.centroids": torch.randn(heads, 3, 12, generator=generator) for layer in layers}
    return {name: tensor / tensor.norm(dim=-1, keepdim=True) for name, tensor in made.items()}


def file(folder: Path, tensors: dict[str, Tensor]) -> str:
    save_file(tensors, folder / "centroids.safetensors")
    return str(folder / "centroids.safetensors")


def half_routed(method: Routing, heads: Heads) -> Tensor:
    """Heads 0 and 2 local, 1 and 3 routed."""
    local = attended(heads, expanded(LOCAL.index(heads), heads))
    some = replace(heads.of([1, 3]), weights=method.weights.tensors)
    routed = mixed(some, oracle.routing(some, method))
    return torch.stack([local[:, 0], routed[:, 0], local[:, 2], routed[:, 1]], 1)


def test_half_the_heads_by_centroids_from_a_file(tmp_path: Path) -> None:
    routing = Routing(heads={1: [1, 3]}, weights=file(tmp_path, centroids(2)))
    model, graph = captured("llama")
    result = Pipeline.parse([LOCAL, routing]).run(graph)
    assert "tamis.routing.layers.1.centroids" in result.graph.program.state_dict
    inputs = prompt(2, 29, None)
    expected = model_by_hand(model, inputs, 1, True, lambda heads: half_routed(routing, heads))
    torch.testing.assert_close(logits(result.graph.program.module(), inputs), expected, rtol=1e-4, atol=1e-4)


FEW = [CCA(span=4, local=6, layers=[0]), Routing(window=9, layers=[1], weights=centroids(4))]
ALL = [
    Combiner(span=4, heads={0: [0, 1]}),
    Dilated(local=4, sink=2, first=1, heads={0: [2]}),
    Routing(clusters=3, heads={0: [3]}),
    CCA(span=4, local=6, heads={1: [0, 1]}),
    Landmark(mem_freq=4, top_k=2, heads={1: [2]}),
    Routing(window=9, heads={1: [3]}, weights=centroids(1)),
]


@pytest.mark.parametrize("passes", [FEW, pytest.param(ALL, marks=pytest.mark.full)], ids=["few", "all"])
def test_exported_files_give_the_same(passes: list[Any], tmp_path: Path) -> None:
    """Methods without an index, at another length and with padding."""
    model, _ = captured("llama")
    fast = tamis.compile(model, kwargs=prompt(2, 40, "left"), passes=passes)
    fast.export(tmp_path / "routed.onnx")
    loaded = tamis.load(tmp_path / "routed.onnx")
    other = prompt(3, 57, "mixed")
    real = other["attention_mask"].bool()
    torch.testing.assert_close(loaded(**other)["logits"][real], logits(fast, other)[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (centroids(3), "for 3 heads, and 4 are routed"),
        (centroids(4, (0,)), "layers.1.centroids missing"),
        ({"layers.1.centroids": torch.zeros(4, 3, 8)}, "not"),
    ],
)
def test_other_centroids_are_refused(tensors: Any, said: str) -> None:
    _, graph = captured("llama")
    with pytest.raises(WeightsMismatch, match=said):
        Pipeline.parse(Routing(layers=[1], weights=tensors)).run(graph)


def test_a_query_in_no_cluster_or_without_earlier_keys_gets_zero() -> None:
    heads = drawn(0, 6, batch=1, kv=1, group=1)
    queries, keys = torch.tensor([[[[0, 3, -1], [3, 5, -1]]]]), torch.tensor([[[[2, 4, -1], [1, 3, -1]]]])
    out = torch.ops.tamis.clustered_attention(heads.queries, heads.keys, heads.values, queries, keys, 0.3, True)[0, 0]
    assert torch.equal(out[[0, 1, 2, 4]], torch.zeros(4, 16))
    scores = heads.queries[0, 0] @ heads.keys[0, 0].T * 0.3
    first, second = (scores[3, seen].softmax(0) @ heads.values[0, 0, seen] for seen in ([2], [1, 3]))
    torch.testing.assert_close(out[3], (first + second) / 2)
    torch.testing.assert_close(out[5], scores[5, [1, 3]].softmax(0) @ heads.values[0, 0, [1, 3]])
