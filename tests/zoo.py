"""The models that tests run on: real architectures, small, with random weights.  The only place that draws weights.

Weights are drawn wide enough that attention is far from uniform: with the libraries' own initialisation (0.02) a wrong
size bias or a wrong merge would drown in the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """One architecture.

    build   layers -> module in eval mode, float32
    inputs  see `image_inputs` and `text_inputs`: batch, length, padding, seed -> (args, kwargs)
    prefix  protected tokens: class, distillation, registers
    tokens  tokens at the default input, prefix included
    layers  depth unless asked otherwise
    dynamic what may change from call to call: "batch", "length"
    without methods that cannot run on it, such as those that score by a class token it does not have
    """

    name: str
    build: Callable[[int], nn.Module]
    inputs: Callable[..., Inputs]
    prefix: int
    tokens: int
    layers: int = 3
    dynamic: tuple[str, ...] = ("batch",)
    padded: bool = False
    oracle: str = "timm"
    without: tuple[str, ...] = ()

    def takes(self, passes: str) -> bool:
        """Whether the methods of a recipe can run on it."""
        return not any(passes.startswith(name) for name in self.without)

    def model(self, dtype: torch.dtype = torch.float32, layers: int | None = None) -> nn.Module:
        """A fresh module; the same weights every time."""
        return draw(self.build(layers or self.layers)).to(dtype).eval()

    def shared(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """One module for all tests; do not change it."""
        return _shared(self.name, dtype)


@cache
def _shared(name: str, dtype: torch.dtype) -> nn.Module:
    return FAMILIES[name].model(dtype)


def draw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew: matrices with gain 1, norms and LayerScale around 1, the rest around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * _spread(name, parameter) + _centre(name, parameter))
    return model


def _is_scale(name: str, parameter: Tensor) -> bool:
    return name.endswith("gamma") or (parameter.dim() == 1 and name.endswith("weight"))


def _centre(name: str, parameter: Tensor) -> float:
    return 1.0 if _is_scale(name, parameter) else 0.0


def _spread(name: str, parameter: Tensor) -> float:
    if _is_scale(name, parameter):
        return 0.3
    if name.endswith("bias"):
        return 0.1
    if "embed" in name or "token" in name or parameter.dim() <= 1:
        return 0.5 if parameter.dim() < 4 else parameter[0].numel() ** -0.5
    return parameter[0].numel() ** -0.5


def quietly(make: Callable[[], nn.Module]) -> nn.Module:
    """Construct without touching the caller's random numbers (constructors draw weights that `draw` replaces)."""
    with torch.random.fork_rng():
        return make()


def image_inputs(size: int, keyword: str | None = None) -> Callable[..., Inputs]:
    """Random images [batch, 3, size, size], positional or as `keyword`."""

    def inputs(batch: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, **_: Any) -> Inputs:
        generator = torch.Generator().manual_seed(1000 + seed)
        # one row at a time, so that a row's pixels do not depend on the batch
        rows = [torch.randn(3, size, size, generator=generator) for _ in range(batch)]
        images = torch.stack(rows).to(dtype)
        return ((images,), {}) if keyword is None else ((), {keyword: images})

    return inputs


def text_inputs(
    batch: int,
    *,
    length: int = 24,
    padding: str | None = "right",
    extra: int = 0,
    seed: int = 0,
    mask: bool = True,
    **_: Any,
) -> Inputs:
    """Random token ids [batch, length + extra] with their attention mask, int64.

    Row i has `length - 5 * (i % 3)` real tokens, whatever padding is; padding=None makes them all real.  `extra` adds
    padding to every row; its ids are random too, so that reading them is noticed.
    """
    generator = torch.Generator().manual_seed(2000 + seed)
    ids = torch.stack([torch.randint(5, 60, (length,), generator=generator) for _ in range(batch)])
    real = [length if padding is None else length - 5 * (i % 3) for i in range(batch)]
    noise = torch.Generator().manual_seed(3000 + seed + extra)
    padded, masks = [], []
    for row, n in zip(ids, real, strict=True):
        fill = torch.randint(5, 60, (length + extra - n,), generator=noise)
        ones, zeros = torch.ones(n, dtype=torch.int64), torch.zeros(length + extra - n, dtype=torch.int64)
        order = (lambda a, b: (b, a)) if padding == "left" else (lambda a, b: (a, b))
        padded.append(torch.cat(order(row[:n], fill)))
        masks.append(torch.cat(order(ones, zeros)))
    kwargs = {"input_ids": torch.stack(padded)}
    return (), {**kwargs, "attention_mask": torch.stack(masks)} if mask else kwargs


def plain_text_inputs(batch: int, **options: Any) -> Inputs:
    """Token ids without a mask."""
    return text_inputs(batch, **{**options, "padding": None, "mask": False})


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


def bert(layers: int) -> nn.Module:
    """BertModel with pooler: post-norm, dynamic length."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "vocab_size": 60}
    config = BertConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=128)
    return quietly(lambda: BertModel(config))


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
        Family("hf_vit", hf_vit, image_inputs(96, "pixel_values"), 1, 37, oracle="hf_vit"),
        Family("hf_vit_classifier", hf_vit_classifier, image_inputs(96, "pixel_values"), 1, 37, oracle="hf_vit"),
        Family("clip_vision", clip_vision, image_inputs(80, "pixel_values"), 1, 26, oracle="clip"),
        Family("bert", bert, text_inputs, 1, 24, dynamic=("batch", "length"), padded=True, oracle="bert"),
        Family("bert_no_mask", bert, plain_text_inputs, 1, 24, dynamic=("batch", "length"), oracle="bert"),
    )
}
