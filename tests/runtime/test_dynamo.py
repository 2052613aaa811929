"""`torch.compile(model, backend="tamis")`: the same as `tamis.compile`, from the graph that Dynamo hands over."""

from __future__ import annotations

import pytest
import timm
import torch
from torch._dynamo.exc import BackendCompilerFailed
from transformers import BertConfig, BertModel

import tamis
from tamis.runtime.dynamo import COMPILED, as_module


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    COMPILED.clear()


@pytest.fixture(scope="module")
def vit():
    return timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64).eval()


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("mode", [None, "default"])
def test_a_vit_at_several_batches(vit, mode):
    expected = tamis.compile(vit, (images(2),), passes="tome:r=2")
    fast = torch.compile(vit, backend="tamis", options={"passes": "tome:r=2", "mode": mode})
    with torch.no_grad():
        for batch in (2, 3, 5, 1):
            torch.testing.assert_close(fast(images(batch)), expected(images(batch)), rtol=1e-5, atol=1e-5)
    # one graph for the first batch, one for every other, one for the batch of one, which Dynamo makes a constant
    assert len(COMPILED) == 3
    assert [row.tokens_out for row in COMPILED[0].report.layers] == [15, 13, 11]


def test_a_text_encoder_with_padding_and_changing_lengths():
    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=99
    )
    model = BertModel(config).eval()
    ids = torch.randint(0, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    recipe = "tome:keep_ratio=0.8"
    expected = tamis.compile(model, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, passes=recipe)
    fast = torch.compile(model, backend="tamis", options={"passes": recipe})
    with torch.no_grad():
        for length in (12, 9, 16):
            call = {
                "input_ids": ids.repeat(1, 2)[:, :length],
                "attention_mask": torch.ones(2, length, dtype=torch.long),
            }
            call["attention_mask"][1, length // 2 :] = 0
            got, want = fast(**call).last_hidden_state, expected(**call)["last_hidden_state"]
            seen = call["attention_mask"].bool()
            torch.testing.assert_close(got[seen], want[seen], rtol=1e-5, atol=1e-5)


def test_weights_are_the_models_own(vit):
    fast = torch.compile(vit, backend="tamis", options={"passes": "tome:r=2"})
    with torch.no_grad():
        before = fast(images(2))
        vit.head.bias += 1
        after = fast(images(2))
        vit.head.bias -= 1
    torch.testing.assert_close(after, before + 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"passes": "tome:r=2", "ratio": 3}, "one of passes, recipe"),
        ({}, "passes"),
        ({"passes": "tomme:r=2"}, "tome"),
        ({"passes": "tome:r=0"}, "NothingChanged"),
    ],
)
def test_mistakes_are_said(vit, options, said):
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=said):
        torch.compile(vit, backend="tamis", options=options)(images(2))


def test_training_mode_is_refused():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64, drop_rate=0.5).train()
    with pytest.raises(BackendCompilerFailed, match="eval mode"):
        torch.compile(model, backend="tamis", options={"passes": "tome:r=2"})(images(2))


def test_inputs_keep_the_users_names():
    seen = []

    def look(graph, inputs, **_):
        module, kept = as_module(graph, inputs)
        seen.append(([node.target for node in module.graph.nodes if node.op == "placeholder"], kept))
        return graph.forward

    layer = torch.nn.BatchNorm1d(4).eval()

    @torch.compile(backend=look)
    def call(pixels, mask):
        return layer(pixels) * mask

    call(torch.randn(2, 4), torch.ones(2, 1))
    assert seen[0][0] == ["pixels", "mask"]
