"""transformers' plain vision, video and audio encoders in the zoo, and the two models whose end needs every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from family import Family, Inputs, image_inputs, quietly
from torch import Tensor, nn

WIDTH = {"hidden_size": 48, "num_attention_heads": 3}
SIZES = {**WIDTH, "intermediate_size": 96}
IMAGE = {"image_size": 64, "patch_size": 16}
MASKED = {**SIZES, "image_size": 80, "patch_size": 16, "mask_ratio": 0.25}
DECODER = {
    "decoder_num_hidden_layers": 2,
    "decoder_hidden_size": 48,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 96,
}
WHISPER = {
    "d_model": 48,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 96,
    "decoder_layers": 1,
    "decoder_attention_heads": 3,
    "max_source_positions": 20,
    "num_mel_bins": 16,
}
DPT = {
    "backbone_out_indices": [0, 1, 2],
    "neck_hidden_sizes": [16, 16, 16],
    "fusion_hidden_size": 16,
    "reassemble_factors": [2, 1, 0.5],
    "is_hybrid": False,
}


def hf(model: str, config: str, **options: Any) -> Callable[[int], nn.Module]:
    """layers -> a model of transformers by the names of its class and of its configuration's."""

    def build(layers: int) -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**options, num_hidden_layers=layers)
        return quietly(lambda: getattr(transformers, model)(made))

    return build


def whisper_encoder(layers: int) -> nn.Module:
    """The encoder of WhisperModel: two convolutions in front, 20 tokens."""
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(**WHISPER, encoder_layers=layers)
    return quietly(lambda: WhisperModel(config)).encoder


class MaskedTokens(nn.Module):
    """The tokens of ViTMAEModel alone: its other outputs do not depend on its layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.vit = hf("ViTMAEModel", "ViTMAEConfig", **MASKED)(layers)

    def forward(self, pixel_values: Tensor, noise: Tensor) -> Tensor:
        """[B, 19, C]: the class token and three quarters of the patches, in the order of their noise."""
        return self.vit(pixel_values, noise=noise).last_hidden_state


def random_inputs(**shapes: tuple[int, ...]) -> Callable[..., Inputs]:
    """Keyword inputs of random numbers [batch, *shape], each row independent of the batch."""

    def inputs(batch: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, **_: Any) -> Inputs:
        generator = torch.Generator().manual_seed(4000 + seed)
        rows = [{name: torch.randn(s, generator=generator) for name, s in shapes.items()} for _ in range(batch)]
        return (), {name: torch.stack([row[name] for row in rows]).to(dtype) for name in shapes}

    return inputs


_PIXELS = image_inputs(64, "pixel_values")
_NOISY = random_inputs(pixel_values=(3, 80, 80), noise=(25,))
_VIDEO = random_inputs(pixel_values=(4, 3, 48, 48))
_SPECTRUM = random_inputs(input_values=(56, 32))
_VIDEO_SIZES = {**SIZES, "image_size": 48, "patch_size": 16, "num_frames": 4, "tubelet_size": 2}
_VIVIT = {**SIZES, "image_size": 48, "num_frames": 4, "tubelet_size": [2, 16, 16]}
_AST = {**SIZES, "max_length": 56, "num_mel_bins": 32, "patch_size": 16, "frequency_stride": 8, "time_stride": 8}
_REGISTERS = "Dinov2WithRegistersModel"
_TEACHER = "DeiTForImageClassificationWithTeacher"

HF = (
    Family(
        "hf_dinov2", hf("Dinov2Model", "Dinov2Config", **WIDTH, **IMAGE), _PIXELS, 1, 17, layers=2, oracle="hf_plain"
    ),
    Family(
        "hf_dinov2_registers",
        hf(_REGISTERS, "Dinov2WithRegistersConfig", **WIDTH, **IMAGE, num_register_tokens=4),
        _PIXELS,
        5,
        21,
        layers=2,
        oracle="hf_plain",
    ),
    Family(
        "hf_dinov2_swiglu",
        hf("Dinov2ForImageClassification", "Dinov2Config", **WIDTH, **IMAGE, use_swiglu_ffn=True),
        _PIXELS,
        1,
        17,
        layers=2,
        oracle="hf_plain",
    ),
    Family("hf_deit", hf("DeiTModel", "DeiTConfig", **SIZES, **IMAGE), _PIXELS, 2, 18, layers=2, oracle="hf_plain"),
    Family(
        "hf_deit_teacher", hf(_TEACHER, "DeiTConfig", **SIZES, **IMAGE), _PIXELS, 2, 18, layers=2, oracle="hf_plain"
    ),
    Family("hf_vit_mae", MaskedTokens, _NOISY, 1, 19, layers=2, oracle="hf_plain"),
    Family(
        "videomae",
        hf("VideoMAEModel", "VideoMAEConfig", **_VIDEO_SIZES),
        _VIDEO,
        0,
        18,
        layers=2,
        oracle="hf_plain",
        without=("evit",),
    ),
    Family(
        "videomae_classifier",
        hf("VideoMAEForVideoClassification", "VideoMAEConfig", **_VIDEO_SIZES),
        _VIDEO,
        0,
        18,
        layers=2,
        oracle="hf_plain",
        without=("evit",),
    ),
    Family("ast", hf("ASTModel", "ASTConfig", **_AST), _SPECTRUM, 2, 20, layers=2, oracle="hf_plain"),
    Family(
        "ast_classifier",
        hf("ASTForAudioClassification", "ASTConfig", **_AST),
        _SPECTRUM,
        2,
        20,
        layers=2,
        oracle="hf_plain",
    ),
    Family("vivit", hf("VivitModel", "VivitConfig", **_VIVIT), _VIDEO, 1, 19, layers=2, oracle="hf_plain"),
    Family(
        "whisper_encoder",
        whisper_encoder,
        random_inputs(input_features=(16, 40)),
        0,
        20,
        layers=2,
        oracle="whisper",
        without=("evit",),
    ),
)

# Only merging can be undone before the decoder of the one and the convolutions of the other.
RESTORED = (
    Family(
        "hf_vit_mae_pretraining",
        hf("ViTMAEForPreTraining", "ViTMAEConfig", **MASKED, **DECODER),
        _NOISY,
        1,
        19,
        oracle="vit_mae_pretraining",
    ),
    Family("dpt", hf("DPTForDepthEstimation", "DPTConfig", **SIZES, **IMAGE, **DPT), _PIXELS, 1, 17, oracle="dpt"),
)
