"""`torch.compile(model, backend="tamis")`: the same as `tamis.compile`, from the graph that Dynamo hands over."""

from __future__ import annotations

import pytest
import timm
import torch
from torch._dynamo.exc import BackendCompilerFailed
from transformers import BertConfig, BertModel

import tamis
from tamis.runtime.dynamo import REPORTS, as_module


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    REPORTS.clear()


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
    assert len(REPORTS) == 3
    assert [row.tokens_out for row in REPORTS[0].layers] == [15, 13, 11]


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


def test_other_weights_of_the_same_shapes_are_used():
    """Dynamo does not compile again for a second model of one class, or for a parameter that was replaced."""
    first, second = (timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64).eval() for _ in range(2))

    @torch.compile(backend="tamis", options={"passes": "tome:r=0", "allow_noop": True})
    def call(model, x):
        return model(x)

    with torch.no_grad():
        for model in (first, second, first):
            torch.testing.assert_close(call(model, images(2)), model(images(2)), rtol=1e-4, atol=1e-4)
        first.head.weight = torch.nn.Parameter(torch.randn_like(first.head.weight))
        torch.testing.assert_close(call(first, images(2)), first(images(2)), rtol=1e-4, atol=1e-4)
        second.load_state_dict({key: value + 0.1 for key, value in second.state_dict().items()}, assign=True)
        torch.testing.assert_close(call(second, images(2)), second(images(2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: torch.nn.functional.dropout(x, 0.5),
        torch.nn.BatchNorm2d(3).train(),
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
    ],
)
def test_whatever_behaves_otherwise_in_training_is_refused(layer):
    @torch.compile(backend="tamis", options={"passes": "tome:r=2"})
    def call(x):
        return layer(x)

    with pytest.raises(BackendCompilerFailed, match="eval mode"):
        call(images(2))


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
