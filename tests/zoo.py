"""The models that tests run on: real architectures, small, with random weights.  Text encoders are in `zoo_text`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from family import Family as Family
from family import Inputs as Inputs
from family import draw as draw
from family import image_inputs as image_inputs
from family import quietly as quietly
from family import text_inputs as text_inputs
from torch import nn
from zoo_hf import HF
from zoo_speech import SPEECH
from zoo_text import TEXT
from zoo_text import bert as bert


def timm_model(name: str, **options: Any) -> Callable[[int], nn.Module]:
    """A timm model by name, narrowed by `options`."""

    def build(layers: int) -> nn.Module:
        import timm

        return quietly(lambda: timm.create_model(name, pretrained=False, depth=layers, **options))

    return build


def _vit_config(layers: int) -> Any:
    from transformers import ViTConfig

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    return ViTConfig(**sizes, num_hidden_layers=layers, image_size=96, patch_size=16, num_labels=7)


def hf_vit(layers: int) -> nn.Module:
    """ViTModel: last_hidden_state and pooler_output."""
    from transformers import ViTModel

    return quietly(lambda: ViTModel(_vit_config(layers)))


def hf_vit_classifier(layers: int) -> nn.Module:
    """ViTForImageClassification: logits."""
    from transformers import ViTForImageClassification

    return quietly(lambda: ViTForImageClassification(_vit_config(layers)))


def clip_vision(layers: int) -> nn.Module:
    """CLIPVisionModel: last_hidden_state and pooler_output."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "projection_dim": 32}
    config = CLIPVisionConfig(**sizes, num_hidden_layers=layers, image_size=80, patch_size=16)
    return quietly(lambda: CLIPVisionModel(config))


_HF_NARROW = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 64, "patch_size": 16}


def hf_dinov3(layers: int) -> nn.Module:
    """DINOv3ViTModel with two register tokens: patches are rotated."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(**_HF_NARROW, num_hidden_layers=layers, num_register_tokens=2)
    return quietly(lambda: DINOv3ViTModel(config))


def hf_beit(layers: int) -> nn.Module:
    """BeitModel with relative position bias, of each layer and of all layers together, and mean pooling."""
    from transformers import BeitConfig, BeitModel

    biases = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
    config = BeitConfig(**_HF_NARROW, **biases, num_hidden_layers=layers)
    return quietly(lambda: BeitModel(config))


def hf_siglip(layers: int) -> nn.Module:
    """SiglipVisionModel: pools by attention of a learned query, whose heads are folded into the batch."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(**_HF_NARROW, num_hidden_layers=layers)
    return quietly(lambda: SiglipVisionModel(config))


_NARROW = {"embed_dim": 96, "num_heads": 3, "num_classes": 10}
_TINY = {**_NARROW, "img_size": 96}
_SMALL = {**_NARROW, "img_size": 64}
_EVA = {**_NARROW, "img_size": 70}
_SIGLIP, _SIGLIP_GAP = "vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_224"
FAMILIES = {
    family.name: family
    for family in (
        Family("vit_small", timm_model("vit_small_patch16_224", **_NARROW), image_inputs(224), 1, 197, layers=2),
        Family("vit_mean", timm_model("vit_small_patch16_224", **_TINY, global_pool="avg"), image_inputs(96), 1, 37),
        Family("deit_distilled", timm_model("deit_tiny_distilled_patch16_224", **_TINY), image_inputs(96), 2, 38),
        Family("deit3_small", timm_model("deit3_small_patch16_224", **_TINY), image_inputs(96), 1, 37),
        Family(
            "dinov2_reg4",
            timm_model("vit_small_patch14_reg4_dinov2", embed_dim=96, num_heads=3, img_size=98),
            image_inputs(98),
            5,
            54,
        ),
        Family("siglip", timm_model(_SIGLIP, **_SMALL), image_inputs(64), 0, 16, without=("evit",)),
        Family("siglip_gap", timm_model(_SIGLIP_GAP, **_SMALL), image_inputs(64), 0, 16, without=("evit",)),
        Family("eva02", timm_model("eva02_tiny_patch14_224", **_EVA), image_inputs(70), 1, 26, oracle="timm_eva"),
        Family("eva02_split", timm_model("eva02_base_patch14_224", **_EVA), image_inputs(70), 1, 26, oracle="timm_eva"),
        Family("dinov3", timm_model("vit_small_patch16_dinov3", **_SMALL), image_inputs(64), 5, 21, oracle="timm_eva"),
        Family("beit", timm_model("beit_base_patch16_224", **_SMALL), image_inputs(64), 1, 17, oracle="timm_beit"),
        Family("beitv2", timm_model("beitv2_base_patch16_224", **_SMALL), image_inputs(64), 1, 17, oracle="timm_beit"),
        Family("hf_dinov3", hf_dinov3, image_inputs(64, "pixel_values"), 3, 19, oracle="hf_dinov3"),
        Family("hf_beit", hf_beit, image_inputs(64, "pixel_values"), 1, 17, oracle="hf_beit"),
        Family("hf_siglip", hf_siglip, image_inputs(64, "pixel_values"), 0, 16, oracle="hf_siglip", without=("evit",)),
        Family("hf_vit", hf_vit, image_inputs(96, "pixel_values"), 1, 37, oracle="hf_vit"),
        Family("hf_vit_classifier", hf_vit_classifier, image_inputs(96, "pixel_values"), 1, 37, oracle="hf_vit"),
        Family("clip_vision", clip_vision, image_inputs(80, "pixel_values"), 1, 26, oracle="clip"),
        *HF,
        *SPEECH,
        *TEXT,
    )
}
