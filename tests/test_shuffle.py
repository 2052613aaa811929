"""Whole models of timm and transformers under a reduction that only reorders tokens: nothing may change.

What reads tokens by position, convolves over them, mixes or compares them is here in modules that really do it.  Each
sees the original order; where that takes every token, a reduction that says it dropped some is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriting import captured, real_rows, run
from shuffling import Shuffle
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import FAMILIES, draw, quietly, text_inputs

from tamis.capture import capture
from tamis.errors import TokenAxisUnsupported
from tamis.graph import TokenGraph
from tamis.rewrite import Pipeline

BUDGET = 1e-9  # float64; only the order of sums differs


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.takes("tome:r=1")])
def test_the_zoo_does_not_notice_another_order(name: str) -> None:
    family, inputs = FAMILIES[name], FAMILIES[name].inputs(3, dtype=torch.float64)
    result = Pipeline((Shuffle(r=1),)).run(captured(name))
    assert all(outcome.applied for outcome in result.outcomes)
    for mine, dense in zip(run(result, inputs), run(captured(name), inputs), strict=True):
        tokens = family.padded and mine.dim() == 3
        for a, b in zip(*(real_rows(family, inputs, x) if tokens else list(x) for x in (mine, dense)), strict=True):
            torch.testing.assert_close(a, b, rtol=BUDGET, atol=BUDGET)


def timm_module(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return build


def hf_module(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return build


class Answers(nn.Module):
    """Question answering as its pipeline does it: a softmax over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.model = hf_module("BertForQuestionAnswering", "BertConfig", **TEXT)()

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        answer = self.model(input_ids)
        return answer.start_logits.softmax(-1), answer.end_logits.softmax(-1)


def images(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))}


def masked_images() -> dict[str, Tensor]:
    return {**images(64), "bool_masked_pos": torch.arange(32).reshape(2, 16) % 3 == 0}


def sound() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 300, generator=torch.Generator().manual_seed(1))}


def padded_sound() -> dict[str, Tensor]:
    return {**sound(), "attention_mask": (torch.arange(300) < torch.tensor([[300], [200]])).long()}


def features() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1))}


def ids() -> dict[str, Tensor]:
    return {"input_ids": text_inputs(2)[1]["input_ids"]}


SIZES = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "num_hidden_layers": 2}
IMAGE = {**SIZES, "image_size": 64, "patch_size": 16}
TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 64}
VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}
DIFF = {**VIT, "embed_dim": 80, "num_heads": 5}
STAGES = {"hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 2]}
SOUND = {
    **SIZES,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "vocab_size": 40,
}
PIT = {"img_size": 64, "base_dims": (8, 8, 8), "heads": (2, 4, 8), "depth": (1, 2, 1)}
PCPVT = {"img_size": 64, "embed_dims": (16, 16, 16, 32), "num_heads": (1, 1, 1, 2), "depths": (1, 1, 1, 2)}

NEEDS_ALL: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "last tokens by position": (
        hf_module(
            "YolosForObjectDetection", "YolosConfig", **{**IMAGE, "image_size": [64, 64]}, num_detection_tokens=3
        ),
        lambda: images(64),
    ),
    "a grid": (hf_module("ViTForMaskedImageModeling", "ViTConfig", **IMAGE, encoder_stride=16), masked_images),
    "softmax over tokens": (Answers, ids),
    "sum over a count": (hf_module("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **SOUND), padded_sound),
    "maximum over tokens": (timm_module("vit_base_patch16_224", **VIT, global_pool="max"), lambda: images(64)),
    "attention pooling": (timm_module("vit_base_patch16_224", **VIT, global_pool="map"), lambda: images(64)),
    "convolution in the MLP": (hf_module("SegformerModel", "SegformerConfig", **STAGES), lambda: images(64)),
    "convolution between blocks": (timm_module("twins_pcpvt_small", **PCPVT), lambda: images(64)),
    "convolution between stages": (timm_module("pit_ti_224", **PIT), lambda: images(64)),
    "convolution beside attention": (
        hf_module("Wav2Vec2BertModel", "Wav2Vec2BertConfig", **SIZES, feature_projection_input_dim=16),
        features,
    ),
    "transposed convolution behind": (hf_module("SEWModel", "SEWConfig", **SOUND), sound),
}
TAKES_SOME: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "convolution before the layers": (hf_module("Wav2Vec2Model", "Wav2Vec2Config", **SOUND), sound),
    "a mask that learns positions": (timm_module("vit_relpos_small_patch16_224", **VIT), lambda: images(64)),
    "two attentions, one of them subtracted": (
        timm_module("vit_dlittle_patch16_reg1_gap_256", **DIFF),
        lambda: images(64),
    ),
    "rotation of each axis": (timm_module("vit_base_patch16_rope_mixed_224", **VIT), lambda: images(64)),
    "rotation in text": (hf_module("EsmModel", "EsmConfig", **TEXT, pad_token_id=1, token_dropout=False), ids),
}


def module_graph(build: Callable[[], nn.Module], inputs: Callable[[], dict[str, Tensor]]) -> tuple[TokenGraph, Any]:
    """The module in float64 and its inputs, positional: parameters are called differently everywhere."""
    double = pytree.tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs())
    model = draw(quietly(build)).eval().double()
    given = ((), double) if "timm" not in type(model).__module__ else (tuple(double.values()), {})
    return capture(model, given[0], kwargs=given[1]), given


@pytest.mark.parametrize("name", [*NEEDS_ALL, *TAKES_SOME])
def test_real_modules_do_not_notice_another_order(name: str) -> None:
    graph, inputs = module_graph(*{**NEEDS_ALL, **TAKES_SOME}[name])
    dense = run(graph, inputs)
    for method in (Shuffle(r=1), Shuffle(r=1, sizes=True)):
        result = Pipeline((method,)).run(graph)
        for mine, expected in zip(run(result, inputs), dense, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-7)  # some compute positions in float32
    dropping = Pipeline((Shuffle(r=1, drops=True),))
    if name in TAKES_SOME:
        for mine, expected in zip(run(dropping.run(graph), inputs), dense, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-7)
    else:
        with pytest.raises(TokenAxisUnsupported, match="dropped some for good"):
            dropping.run(graph)
