"""Models with a dense or detection head, small: after the encoder they need every token, or tokens by place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from family import Family, image_inputs, quietly
from torch import Tensor, nn
from zoo_hf import DPT, IMAGE, SIZES, hf

_PIXELS = image_inputs(64, "pixel_values")
_TIMM = {"embed_dim": 48, "num_heads": 3, "img_size": 64}
_RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 8, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage3"],
}
_DETR = {
    "d_model": 48,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_layers": 2,
    "num_queries": 7,
    "use_pretrained_backbone": False,
}
_SEGFORMER = {
    "num_encoder_blocks": 2,
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [8, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
    "num_labels": 5,
}


class Features(nn.Module):
    """The maps [B, C, 4, 4] of every block that timm's `forward_intermediates` gives."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        import timm

        self.vit = quietly(lambda: timm.create_model("vit_tiny_patch16_224", depth=layers, **_TIMM))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, 64, 64]."""
        return self.vit.forward_intermediates(images, intermediates_only=True)


def timm_features(layers: int) -> nn.Module:
    """timm's wrapper for feature extraction, `features_only=True`."""
    import timm

    options: dict[str, Any] = {"features_only": True, "out_indices": tuple(range(layers))}
    return quietly(lambda: timm.create_model("vit_tiny_patch16_224", depth=layers, **_TIMM, **options))


def depth_anything(layers: int) -> nn.Module:
    """DINOv2 below DPT's neck."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    stages = [f"stage{i + 1}" for i in range(layers)]
    width = {"hidden_size": 48, "num_attention_heads": 3}
    body = Dinov2Config(**width, **IMAGE, num_hidden_layers=layers, out_features=stages, reshape_hidden_states=False)
    neck = {"reassemble_hidden_size": 48, "neck_hidden_sizes": [8] * layers, "reassemble_factors": [2, 1, 0.5][:layers]}
    head = {"fusion_hidden_size": 8, "head_hidden_size": 8}
    config = DepthAnythingConfig(backbone_config=body, patch_size=16, **neck, **head)
    return quietly(lambda: DepthAnythingForDepthEstimation(config))


def detr(layers: int) -> nn.Module:
    """A small ResNet, an encoder that is reduced, and a decoder whose queries read it."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    config = DetrConfig(**_DETR, encoder_layers=layers, backbone_config=ResNetConfig(**_RESNET))
    return quietly(lambda: DetrForObjectDetection(config))


def segformer(layers: int) -> nn.Module:
    """Two stages, the first with keys from a coarser grid; every MLP holds a convolution over the grid."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(**_SEGFORMER, depths=[1, layers])
    return quietly(lambda: SegformerForSemanticSegmentation(config))


def _dense(
    name: str, build: Callable[[int], nn.Module], tokens: int, prefix: int = 1, oracle: str = "", **options: Any
) -> Family:
    return Family(name, build, options.pop("inputs", _PIXELS), prefix, tokens, oracle=oracle or name, **options)


DENSE = (
    _dense(
        "dpt_segmentation",
        hf("DPTForSemanticSegmentation", "DPTConfig", **SIZES, **IMAGE, **DPT, num_labels=5, use_auxiliary_head=False),
        17,
        oracle="dpt",
    ),
    _dense("depth_anything", depth_anything, 17),
    _dense("timm_intermediates", Features, 17, oracle="timm_maps", inputs=image_inputs(64)),
    _dense("timm_features", timm_features, 17, oracle="timm_maps", inputs=image_inputs(64)),
    _dense("detr", detr, 16, prefix=0),
    _dense(
        "yolos",
        hf(
            "YolosForObjectDetection",
            "YolosConfig",
            **SIZES,
            image_size=[64, 64],
            patch_size=16,
            num_detection_tokens=5,
        ),
        22,
    ),
    _dense("segformer", segformer, 16, prefix=0, layers=2),
)
