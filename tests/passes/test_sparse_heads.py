"""Sparse attention of some heads of a layer: each head gets what its own method gives, the others the original."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from decoders import captured, prompt
from sparse_oracle import attended, drawn

import tamis
from tamis.attention_index import key_heads, some_heads
from tamis.errors import BadParameter, NothingChanged
from tamis.passes.methods.a_shape import AShape
from tamis.passes.methods.block_sparse import BlockSparse
from tamis.passes.sparse import SparseAttention
from tamis.passes.sparse_rewrite import joined
from tamis.registry import origin_of, registered_passes
from tamis.rewrite import Pipeline, parse_passes

WINDOW = "a-shape:sink=1,local=4"
TILES = "block-sparse:density=0.3,block=8"


@cache
def first_layer(passes: str | None) -> torch.Tensor:
    """What the first layer's attention gives, [B, H, N, D], for three padded prompts: the output projection's input."""
    _, graph = captured("llama")
    program = Pipeline.parse(passes).run(graph).graph.program if passes else graph.program
    module = program.module()
    found: list[torch.Tensor] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            value = super().run_node(n)
            if n.target is torch.ops.aten.linear.default and "o_proj" in str(n.args[1].target):
                found.append(self.fetch_args_kwargs_from_env(n)[0][0])
            return value

    inputs = prompt(3, 61, "mixed")
    with torch.no_grad():
        Watch(module).run(*inputs.values(), enable_io_processing=False)
    return found[0].reshape(3, 61, 4, -1).transpose(1, 2)


def test_each_head_of_the_first_layer_has_what_its_pass_gives() -> None:
    inputs = prompt(3, 61, "mixed")
    real = inputs["attention_mask"].bool()[:, None, :, None].expand(-1, 1, -1, 12)
    mixed = first_layer(f"{WINDOW},heads=[3,1] + {TILES},heads={{0:[0],1:[0,2]}}")
    for head, passes in enumerate((TILES, WINDOW, None, WINDOW)):
        alone = first_layer(passes)
        got, expected = (x[:, head : head + 1][real] for x in (mixed, alone))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        for other in {TILES, WINDOW, None} - {passes}:
            assert (got - first_layer(other)[:, head : head + 1][real]).norm() > 0.05 * got.norm()


def test_any_lengths_batches_and_back_ends_agree(tmp_path: Any) -> None:
    model, _ = captured("gemma2")
    passes = f"{WINDOW},heads={{1:[0,1]}} + {TILES},heads={{-1:[3]}}"
    fast = tamis.compile(model, kwargs=prompt(2, 40, "left"), passes=passes, verify=False)
    assert [o["layer"] for o in fast.report.outcomes if o["applied"]] == [1, 1]
    fast.export(tmp_path / "heads.onnx")
    loaded, other = tamis.load(tmp_path / "heads.onnx"), prompt(3, 57, "mixed")
    real = other["attention_mask"].bool()
    with torch.no_grad():
        expected = fast(**other).logits[real]
    torch.testing.assert_close(loaded(**other)["logits"][real], expected, rtol=1e-4, atol=1e-4)


def test_all_heads_at_full_budget_are_the_original() -> None:
    _, graph = captured("llama")
    inputs = prompt(2, 50, "mixed")
    real = inputs["attention_mask"].bool()
    passes = [AShape(local=100, heads=[0, 2]), BlockSparse(density=1.0, block=16, heads=[1])]
    program = Pipeline.parse(passes).run(graph).graph.program
    with torch.no_grad():
        expected = graph.program.module()(**inputs).logits[real]
        torch.testing.assert_close(program.module()(**inputs).logits[real], expected, rtol=1e-4, atol=1e-4)


def test_some_heads_and_their_keys() -> None:
    heads = drawn(0, 20, kv=2, group=2)
    assert heads.of([0, 1]).group == 2
    assert heads.of([1, 2, 3]).keys.shape[1] == 3
    assert torch.equal(heads.of([1, 2]).keys[:, 1], heads.keys[:, 1])
    assert torch.equal(heads.of([1, 2]).keys_before_rope[:, 0], heads.keys[:, 0])
    assert heads.of(range(4)).queries is heads.queries
    assert key_heads([0, 1, 3], 2) == [0, 0, 1]
    x = torch.arange(24.0).reshape(1, 6, 4, 1)
    assert torch.equal(some_heads(x, [0, 2, 3, 5]), x[:, [0, 2, 3, 5]])
    assert torch.equal(joined([([5, 0], x[:, [5, 0]]), ([1, 2, 3, 4], x[:, 1:5])]), x)


@pytest.mark.parametrize("chosen", [[0, 1], [1, 2]])
def test_every_method_takes_some_heads(chosen: list[int]) -> None:
    """A whole group, whose heads share keys, and parts of two: at full budget dense attention of those heads."""
    heads = drawn(4, 70)
    known = registered_passes().values()
    for method in (cls.full(70) for cls in known if issubclass(cls, SparseAttention) and origin_of(cls) == "tamis"):
        got = method.attend(heads.of(chosen))
        torch.testing.assert_close(got.double(), attended(heads)[:, chosen], rtol=1e-5, atol=1e-5, msg=method.name)


def test_a_later_pass_takes_heads_from_an_earlier_one() -> None:
    _, graph = captured("llama")
    result = Pipeline.parse(f"{WINDOW} + {TILES},heads=[1]").run(graph)
    assert [(o.pass_name.partition(":")[0], o.layer) for o in result.outcomes if o.applied] == [
        ("a-shape", 0),
        ("block-sparse", 0),
        ("a-shape", 1),
        ("block-sparse", 1),
    ]
    with pytest.raises(NothingChanged, match="has this layer"):
        Pipeline.parse(f"{WINDOW},heads=[1] + {TILES},heads=[0,1]").run(graph)


def test_recall_is_that_of_each_heads_pass() -> None:
    _, graph = captured("llama")
    inputs = prompt(1, 60, None)
    mixed, window, tiles = (
        tamis.attention_recall(graph, kwargs=inputs, passes=f"{passes}").layers[1]
        for passes in (f"{WINDOW},heads=[3] + {TILES},heads=[0,1],share=kv", WINDOW, f"{TILES},share=kv")
    )
    assert mixed.recall == pytest.approx((tiles.recall[0], tiles.recall[1], 1.0, window.recall[3]))
    assert mixed.density == pytest.approx((tiles.density[0], tiles.density[1], 1.0, window.density[3]))
    assert mixed.alone is not None
    assert tiles.alone is not None
    assert mixed.alone == pytest.approx((*tiles.alone[:2], 1.0, window.recall[3]))
    assert mixed.method == f"{WINDOW} at heads 3; {TILES},share=kv at heads 0, 1; dense at heads 2"


def test_a_pass_with_heads_reads_as_its_text() -> None:
    one = AShape(sink=1, local=4, heads={0: [1, 3], -1: 2})
    assert str(one) == "a-shape:heads={0:[1,3],-1:[2]},sink=1,local=4"
    assert parse_passes(str(one)) == [one]


@pytest.mark.parametrize(
    ("passes", "name"),
    [
        (f"{WINDOW},heads=all", "heads must be a list of head indices"),
        (f"{WINDOW},heads={{}}", "heads must be for some layer"),
        (f"{WINDOW},heads={{0:[]}}", "heads must be a list of head indices"),
        (f"{WINDOW},heads=[4]", "heads must be between 0 and 3, got 4"),
        (f"{WINDOW},heads={{7:[0]}}", "heads must be for layers between 0 and 1, got 7"),
        (f"{WINDOW},heads={{0:[0]}},layers=[0]", "layers must be left out"),
        (f"{TILES},share=kv,heads=[0,1,2]", "heads must be whole groups of 2 where share=kv"),
    ],
)
def test_wrong_heads_are_said(passes: str, name: str) -> None:
    _, graph = captured("llama")
    with pytest.raises(BadParameter, match=name):
        Pipeline.parse(passes).run(graph)
