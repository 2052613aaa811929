"""What the user reads when capture or a pass refuses, by its text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import FAMILIES, draw, quietly

from tamis.capture import capture
from tamis.errors import (
    DataDependentControlFlow,
    NoAttention,
    NothingChanged,
    PositionRead,
    TokenAxisUnsupported,
    TrainingMode,
    WindowedAttention,
)
from tamis.graph import TokenGraph
from tamis.rewrite import Pipeline


def message(error: type[Exception], action) -> str:
    with pytest.raises(error) as caught:
        action()
    assert type(caught.value) is error
    return str(caught.value)


# --- models that have nothing to reduce -----------------------------------------------------------------------------


def timm_model(name: str, **options) -> nn.Module:
    import timm

    return quietly(lambda: timm.create_model(name, pretrained=False, **options)).eval()


def test_swin_is_refused_because_its_attention_is_windowed():
    model = timm_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=32, num_heads=(1, 1, 1, 1))
    text = message(WindowedAttention, lambda: capture(model, (torch.zeros(2, 3, 224, 224),), name="swin"))
    assert text.startswith("swin: attention at layers.0.blocks.0.attn")
    assert "runs inside windows: it sees 49 tokens of a batch that was regrouped by " in text
    assert text.endswith(
        "hint: windowed models (Swin and its kin) need every token of the grid in place; no token reduction applies."
    )


def test_a_convolutional_network_has_no_attention():
    text = message(NoAttention, lambda: capture(timm_model("resnet18"), (torch.zeros(2, 3, 64, 64),), name="resnet18"))
    assert text == (
        "resnet18: no attention was found (scaled_dot_product_attention, or matmul-softmax-matmul).\n"
        "  hint: tamis removes tokens from transformers; a convolutional network has none to remove."
    )


class BranchesOnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


def test_data_dependent_control_flow_names_the_line():
    text = message(DataDependentControlFlow, lambda: capture(BranchesOnData().eval(), (torch.zeros(2, 4),), name="m"))
    assert text.startswith("m: its control flow depends on the data in its tensors, which no graph can hold: ")
    assert line_of("  if x.sum() > 0:").removesuffix(": ") in text
    assert "\n  hint: " in text


def test_training_mode_is_refused():
    model = FAMILIES["hf_vit"].model().train()
    args, kwargs = FAMILIES["hf_vit"].inputs(2)
    text = message(TrainingMode, lambda: capture(model, args, kwargs=kwargs, name="vit"))
    assert text == (
        "vit: the model is in training mode, so dropout and batch statistics would be captured.\n"
        "  hint: call model.eval() first."
    )


# --- reads that do not survive --------------------------------------------------------------------------------------


class Body(nn.Module):
    """timm's ViT without its end."""

    def __init__(self) -> None:
        super().__init__()
        self.body = FAMILIES["vit_mean"].build(2)


class ReadsFifth(Body):
    def forward(self, images: Tensor) -> Tensor:
        return self.body.forward_features(images)[:, 5]


class ReadsLast(Body):
    def forward(self, images: Tensor) -> Tensor:
        return self.body.forward_features(images)[:, -1]


class ReadsClassToken(Body):
    def forward(self, images: Tensor) -> Tensor:
        return self.body.forward_features(images)[:, 0]


class ReadsDifferences(Body):
    def forward(self, images: Tensor) -> Tensor:
        x = self.body.forward_features(images)
        return x[:, 2:] - x[:, 1:-1]


def reading(module: type[Body]) -> TokenGraph:
    return capture(draw(module()).eval(), FAMILIES["vit_mean"].inputs(2)[0], name="reads")


def line_of(code: str) -> str:
    """`file:line` of the one line that ends in `code`."""
    (line,) = (i for i, source in enumerate(Path(__file__).read_text().splitlines(), 1) if source.endswith(code))
    return f"{__file__}:{line}: "


def test_reading_a_token_by_position_after_a_reduction():
    text = message(PositionRead, lambda: Pipeline.parse("tome:r=4").run(reading(ReadsFifth)))
    assert text.startswith(line_of("forward_features(images)[:, 5]"))
    assert (
        "reads token 5 by its position, but after tome:r=4 at layer 1 tokens have moved and only the first 1 stay in "
        "place (shape was f32[batch, 37, 96], is f32[batch, 29, 96])." in text
    )
    assert "node select" in text
    assert text.endswith("or keep the layers before this read unreduced (layers=...).")


def test_reading_the_last_token_after_a_reduction():
    assert "reads token -1 by its position" in message(
        PositionRead, lambda: Pipeline.parse("random:r=4").run(reading(ReadsLast))
    )


def test_reading_the_class_token_is_fine():
    assert Pipeline.parse("tome:r=4").run(reading(ReadsClassToken)).changed


def test_neighbour_differences_need_every_token():
    text = message(TokenAxisUnsupported, lambda: Pipeline.parse("random:r=4").run(reading(ReadsDifferences)))
    assert text.startswith(line_of("x[:, 2:] - x[:, 1:-1]"))
    assert "needs every token in its place, but random:r=4 at layer 1 dropped some for good" in text
    assert "hint: use a merging pass (tome), which can be undone before this node, passthrough=true (evit" in text


def test_what_merging_can_undo_is_undone_before_such_a_read():
    graph = reading(ReadsDifferences)
    result = Pipeline.parse("tome:r=4").run(graph)
    images = FAMILIES["vit_mean"].inputs(3)[0]
    with torch.no_grad():
        got, dense = result.graph.program.module()(*images), graph.program.module()(*images)
    assert got.shape == dense.shape == (3, 35, 96)
    assert (got == 0).all(-1).any(), "neighbours that merged are equal"


class Bag(nn.Module):
    """Attention over tokens without a class token: nothing is read by position."""

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.body = timm.create_model(
            "vit_small_patch16_224",
            embed_dim=32,
            num_heads=2,
            depth=2,
            img_size=64,
            class_token=False,
            global_pool="avg",
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def test_evit_needs_a_class_token():
    graph = capture(draw(quietly(Bag)).eval(), (torch.zeros(2, 3, 64, 64),))
    assert (graph.prefix, graph.class_token) == (0, False)
    text = message(NothingChanged, lambda: Pipeline.parse("evit").run(graph))
    assert "it scores tokens by the class token's attention, and this model has no class token" in text
    assert Pipeline.parse("tome:r=4").run(graph).changed
