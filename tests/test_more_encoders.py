"""Encoders that are one of the zoo's but for what stands in front of their layers, and models that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import image_inputs, quietly
from oracle import reduced_forward
from rewriting import applied, assert_equal_outputs, run
from torch import nn
from zoo_hf import IMAGE, SIZES, random_inputs
from zoo_speech import ALIKE, FRAMES, PLACES, WAVE

from tamis.capture import capture
from tamis.errors import NoTokenStream, TamisError, UnknownAttention, WindowedAttention
from tamis.rewrite import Pipeline
from tamis.stream_errors import PackedBatch

FAMILIES = {family.name: family for family in ALIKE}


@pytest.mark.parametrize("name", FAMILIES)
def test_they_equal_the_oracle(name: str) -> None:
    family = FAMILIES[name]
    model = family.shared(torch.float64)
    args, kwargs = family.inputs(2, dtype=torch.float64)
    graph = capture(model, args, kwargs=kwargs)
    for passes in ("tome:r=3", "random:r=2"):
        result, inputs = Pipeline.parse(passes).run(graph), family.inputs(3, dtype=torch.float64)
        answer = reduced_forward(family, model, inputs, passes)
        assert answer.stream.counts == [(o.layer, o.before, o.after) for o in applied(result)]
        assert_equal_outputs(run(result, inputs), answer.outputs, 1e-5)


def _resnet() -> Any:
    from transformers import ResNetConfig

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4}
    return ResNetConfig(**sizes, layer_type="basic", out_features=STAGES)


STAGES = ["stage1", "stage2", "stage3", "stage4"]
DECODER = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 7}
NARROW = {"hidden_size": 48, "num_attention_heads": 3}


def maskformer() -> nn.Module:
    from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation

    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    sizes = {"fpn_feature_size": 64, "mask_feature_size": 64}
    config = MaskFormerConfig(backbone_config=_resnet(), decoder_config=DetrConfig(**DECODER, **heads), **sizes)
    return MaskFormerForInstanceSegmentation(config)


def mask2former() -> nn.Module:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    sizes = {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "encoder_feedforward_dim": 64}
    layers = {"encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 4, "dim_feedforward": 64}
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=_resnet(), **sizes, **layers, num_queries=7)
    )


def sam() -> nn.Module:
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    windows = {"window_size": 3, "global_attn_indexes": [1], "mlp_dim": 96, "output_channels": 16}
    return SamVisionEncoder(SamVisionConfig(**NARROW, **IMAGE, num_hidden_layers=2, **windows))


def vitmatte() -> nn.Module:
    from transformers import VitDetConfig, VitMatteConfig, VitMatteForImageMatting

    plain = {"num_channels": 4, "window_size": 0, "pretrain_image_size": 64, "out_features": ["stage2"]}
    body = VitDetConfig(**NARROW, **IMAGE, num_hidden_layers=2, **plain)
    head = {"fusion_hidden_sizes": [16, 8, 8, 8], "convstream_hidden_sizes": [8, 8, 8]}
    return VitMatteForImageMatting(VitMatteConfig(backbone_config=body, hidden_size=48, **head))


def timesformer() -> nn.Module:
    from transformers import TimesformerConfig, TimesformerModel

    return TimesformerModel(TimesformerConfig(**SIZES, num_hidden_layers=1, image_size=48, num_frames=4, patch_size=16))


def wavlm() -> nn.Module:
    from transformers import WavLMConfig, WavLMModel

    return WavLMModel(WavLMConfig(**SIZES, **FRAMES, **PLACES, num_hidden_layers=1))


def pixtral() -> nn.Module:
    from transformers import PixtralVisionConfig, PixtralVisionModel

    return PixtralVisionModel(PixtralVisionConfig(**SIZES, **IMAGE, num_hidden_layers=1))


REFUSED = {
    "maskformer": (maskformer, image_inputs(96, "pixel_values"), NoTokenStream, "its tokens are learned queries"),
    "mask2former": (mask2former, image_inputs(96, "pixel_values"), NoTokenStream, "tokens in front of the batch"),
    "sam": (sam, image_inputs(64, "pixel_values"), WindowedAttention, "it sees 9 tokens of a batch that was regrouped"),
    "vitmatte": (vitmatte, random_inputs(pixel_values=(4, 64, 64)), UnknownAttention, "its heads are folded"),
    "timesformer": (timesformer, random_inputs(pixel_values=(4, 3, 48, 48)), WindowedAttention, "it sees 4 tokens"),
    "wavlm": (wavlm, WAVE, UnknownAttention, "its heads are folded"),
    "pixtral": (
        pixtral,
        image_inputs(64, "pixel_values"),
        PackedBatch,
        "one row that holds the tokens of all 2 images",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reduced_is_refused_with_the_reason(name: str) -> None:
    build, inputs, error, reason = REFUSED[name]
    args, kwargs = inputs(2)
    with pytest.raises(TamisError, match=reason) as raised:
        capture(quietly(build).eval(), args, kwargs=kwargs)
    assert type(raised.value) is error
