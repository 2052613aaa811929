"""attention_recall against attention weights that transformers hands out, and pairs written out one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from decoders import DECODERS, captured, given_weights, positions, prompt
from sparse_oracle import drawn, expanded, fixture, recall, weights

import tamis
from tamis.errors import BadParameter, InputMismatch, NothingChanged
from tamis.passes.index_pairs import held
from tamis.passes.methods.a_shape import AShape, TriShape
from tamis.passes.methods.block_sparse import BlockSparse
from tamis.passes.methods.longformer import Longformer
from tamis.passes.methods.pbs import PBS
from tamis.passes.methods.vertical_slash import VerticalSlash
from tamis.rewrite import Pipeline
from tamis.runtime.recall import recalls


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_static_patterns_read_what_the_models_own_weights_say(name: str) -> None:
    inputs = prompt(3, 40, "mixed")
    real = inputs["attention_mask"].bool()
    sink, local, after = 2, 6, 10
    place = positions(inputs["attention_mask"])
    apart = place.unsqueeze(2) - place.unsqueeze(1)
    below = (apart >= 0) & real.unsqueeze(1) & real.unsqueeze(2) & (place >= after).unsqueeze(2)
    read = below & ((apart < local) | (place < sink).unsqueeze(1))
    _, graph = captured(name)
    found = tamis.attention_recall(graph, kwargs=inputs, passes=AShape(sink=sink, local=local), after=after)
    given = given_weights(name, inputs)
    assert [layer.layer for layer in found.layers] == [*range(len(given))]
    assert not found.skipped
    queries = below.any(-1).sum()
    for layer in found.layers:
        seen = below & (apart <= (DECODERS[name].windows[layer.layer] or 40))
        expected = (given[layer.layer] * read.unsqueeze(1)).sum((0, 2, 3)) / queries
        torch.testing.assert_close(torch.tensor(layer.recall).double(), expected, rtol=1e-5, atol=1e-6)
        assert layer.density == pytest.approx([((read & seen).sum() / seen.sum()).item()] * 4)
        assert layer.alone is None
    assert 0.1 < found.recall < 0.999


def test_a_choice_is_made_from_the_heads_of_each_layer() -> None:
    """In the last layer, from hidden states of the dense model, rows of 8 read the tiles that their heads choose."""
    model, graph = captured("llama")
    inputs = prompt(2, 61, None)
    heads: list[Any] = []

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
        heads.append(replace(drawn(0, 2), queries=query, keys=key, values=value, scale=rest["scaling"]))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2), None

    from transformers import AttentionInterface

    AttentionInterface.register("taken", attention)
    model.set_attn_implementation("taken")
    try:
        with torch.no_grad():
            model(input_ids=inputs["input_ids"])
    finally:
        model.set_attn_implementation("sdpa")
    method = BlockSparse(density=0.3, block=8, share="kv", layers=[-1])
    (layer,) = tamis.attention_recall(graph, kwargs=inputs, passes=method).layers
    each = {share: expanded(replace(method, share=share).index(heads[1]), heads[1]) for share in ("kv", "query")}
    parts = {share: recall(heads[1], mask).mean((0, 2)) for share, mask in each.items()}
    torch.testing.assert_close(torch.tensor(layer.recall).double(), parts["kv"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(layer.alone).double(), parts["query"], rtol=1e-5, atol=1e-6)
    assert layer.layer == 1
    pairs = each["kv"].sum((0, 2, 3)) / (2 * 61 * 62 / 2)
    assert layer.density == pytest.approx(pairs.tolist())


@pytest.mark.parametrize("lengths", [None, [101, 60]])
@pytest.mark.parametrize(
    "method",
    [
        TriShape(sink=3, local=9, last=5),
        Longformer(window=12, first=2),
        VerticalSlash(columns=8, slashes=6, sink=2, near=3, estimate=8, block=8),
        BlockSparse(density=0.3, block=8, share="layer"),
        PBS(density=0.5, block=8, segment=16, threshold=0.4),
        PBS(density=0.5, block=8, segment=16, threshold=0.4, share="layer"),
    ],
    ids=lambda one: one.name,
)
def test_every_part_of_an_index_is_counted(method: Any, lengths: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of queries that do not fit rows, against pairs written out; both ways of causality where there are two."""
    monkeypatch.setattr("tamis.passes.index_pairs.AT_ONCE", 2 * 4 * 101 * 7)
    for causal in {True, not method.bidirectional}:
        heads = replace(drawn(3, 101, lengths=lengths), causal=causal)
        index = method.index(heads)
        mask = expanded(index, heads)
        (found,) = held(heads, [index])
        seen = weights(heads) > 0
        queries = sum(lengths or [101, 101])
        real = torch.arange(101) < torch.tensor(lengths or [101, 101]).reshape(-1, 1)
        assert found.queries == queries
        assert found.visible == (seen & real[:, None, :, None])[:, 0].sum()
        assert found.read.tolist() == mask.sum((0, 2, 3)).tolist()
        expected = (recall(heads, mask) * real.unsqueeze(1)).sum((0, 2))
        torch.testing.assert_close(found.mass, expected, rtol=1e-5, atol=1e-5)


def test_the_cards_example() -> None:
    index = AShape(sink=2, local=4).index(fixture())
    (found,) = held(fixture(), [index])
    assert round(sum(found.recall) / 2, 4) == 0.7062
    assert found.density == [81 / 136, 81 / 136]
    assert (found + found).recall == found.recall


def test_several_passes_are_measured_in_one_run() -> None:
    _, graph = captured("llama")
    inputs = prompt(1, 50, None)
    pipelines = [Pipeline.parse(text) for text in ("a-shape:sink=1,local=4", "a-shape:sink=1,local=20,layers=[1]")]
    few, more = recalls(graph, ((), inputs), pipelines)
    assert [layer.layer for layer in more.layers] == [1]
    assert few.recall < more.recall < 1
    alone = tamis.attention_recall(graph, kwargs=inputs, passes=str(pipelines[1]))
    assert alone == more
    text = str(few)
    assert text.startswith("a-shape:sink=1,local=4: recall 0.")
    assert len(text.splitlines()) == 4
    assert few.to_dict()["layers"][0]["layer"] == 0


def test_a_compiled_model_says_what_its_own_passes_read() -> None:
    model, _ = captured("llama")
    inputs = prompt(1, 50, None)
    fast = tamis.compile(model, kwargs=inputs, passes="a-shape:sink=1,local=8", verify=False)
    assert tamis.attention_recall(fast) == tamis.attention_recall(model, kwargs=inputs, passes="a-shape:sink=1,local=8")


def test_what_is_no_sparse_attention_is_refused() -> None:
    _, graph = captured("llama")
    with pytest.raises(BadParameter, match="sparse attention"):
        tamis.attention_recall(graph, kwargs=prompt(1, 20, None), passes="tome:r=2")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"after": -1}, BadParameter, "after must be a whole number, 0 or more, got -1"),
        ({"after": 20}, BadParameter, "after must be less than the 20 tokens there are, got 20"),
        ({"passes": None}, BadParameter, "passes must be given"),
        (
            {"kwargs": torch.ones(1, 20)},
            BadParameter,
            "a mapping from the names of inputs, got a Tensor",
        ),
        ({"kwargs": {"attention_mask": torch.ones(1, 20, dtype=torch.int64)}}, InputMismatch, "input_ids is missing"),
        (
            {"kwargs": prompt(1, 20, None) | {"attention_mask": torch.ones(1, 9, dtype=torch.int64)}},
            InputMismatch,
            "20",
        ),
    ],
)
def test_what_cannot_be_measured_is_said(options: Any, error: type[Exception], said: str) -> None:
    _, graph = captured("llama")
    with pytest.raises(error, match=said):
        tamis.attention_recall(graph, **{"kwargs": prompt(1, 20, None), "passes": "a-shape:local=4", **options})


def test_a_method_without_an_index_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph = captured("llama")
    monkeypatch.setattr(AShape, "indexed", False)
    with pytest.raises(NothingChanged, match="more than keys"):
        tamis.attention_recall(graph, kwargs=prompt(1, 20, None), passes="a-shape")


def test_some_queries_stand_for_all() -> None:
    heads = drawn(4, 101, lengths=[101, 60])
    index = BlockSparse(density=0.3, block=8).index(heads)
    mask, dense = expanded(index, heads), weights(heads)
    (found,) = held(heads, [index], after=16, every=17)
    places = torch.arange(16, 101, 17)
    assert found.queries == 5 + 3  # 16, 33, 50, 67, 84; of the shorter row the first three
    expected = (dense * mask)[:, :, places].sum((0, 2, 3)) / found.queries
    torch.testing.assert_close(torch.tensor(found.recall).double(), expected, rtol=1e-5, atol=1e-6)
    assert found.density == pytest.approx((mask[:, :, places].sum((0, 2, 3)) / found.visible).tolist())
    assert held(heads, [index], after=101, every=17)[0].queries == 0
