"""Small transformers with random weights and the ONNX files that common exporters make of them."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxslim
import torch
from torch import Tensor, nn

LAYERS = 2
TEXT = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}
IMAGE = {"pixel_values": {0: "batch"}}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


@dataclass(frozen=True)
class Exportable:
    """A model to export: how it is built, its dynamic dimensions by input, its outputs by name."""

    build: Callable[[], nn.Module]
    dims: dict[str, dict[int, str]]
    outputs: tuple[str, ...]


class ByName(nn.Module):
    """A Hugging Face model called by position, as exporters want it, that returns some outputs as a tuple."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        result = self.model(**dict(zip(self.inputs, args, strict=True)))
        return tuple(result[name] for name in self.outputs)


def hugging_face(
    model: str, config: str, dims: dict[str, dict[int, str]], outputs: tuple[str, ...], **kw: Any
) -> Exportable:
    """A model class of transformers with a small configuration."""

    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, model)(getattr(transformers, config)(**kw))
        return ByName(made, tuple(dims), outputs)

    return Exportable(build, dims, outputs)


def timm_vit() -> nn.Module:
    """A ViT of timm for images of 32 pixels."""
    import timm

    return timm.create_model(
        "vit_small_patch16_224", embed_dim=32, num_heads=2, depth=LAYERS, img_size=32, patch_size=8, num_classes=5
    )


STATES = ("last_hidden_state",)
WORDS = {"vocab_size": 99, "max_position_embeddings": 64}
MODELS = {
    "bert": hugging_face("BertModel", "BertConfig", TEXT, (*STATES, "pooler_output"), **SMALL, **WORDS),
    "roberta": hugging_face("RobertaModel", "RobertaConfig", TEXT, STATES, **SMALL, **WORDS, pad_token_id=1),
    "t5": hugging_face(
        "T5EncoderModel",
        "T5Config",
        TEXT,
        STATES,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=LAYERS,
        num_heads=2,
        vocab_size=99,
    ),
    "clip": hugging_face(
        "CLIPVisionModel", "CLIPVisionConfig", IMAGE, (*STATES, "pooler_output"), **SMALL, image_size=32, patch_size=8
    ),
    "vit": Exportable(timm_vit, IMAGE, ("logits",)),
}


def inputs_of(name: str, batch: int, length: int = 9) -> dict[str, Tensor]:
    """Inputs by name; of text, the last row is padded."""
    generator = torch.Generator().manual_seed(batch)
    if "pixel_values" in MODELS[name].dims:
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - 3 :] = 0
    return {"input_ids": torch.randint(3, 90, (batch, length), generator=generator), "attention_mask": mask}


@functools.cache
def folder() -> Path:
    """Where files of this run lie."""
    return Path(tempfile.mkdtemp(prefix="tamis-onnx-"))


@functools.cache
def exported(name: str, exporter: str) -> Path:
    """The file of a model by "dynamo", "torchscript" (opset 17) or "slim" (dynamo, then onnxslim); made once."""
    path = folder() / f"{name}-{exporter}.onnx"
    if exporter == "slim":
        onnx.save(onnxslim.slim(str(exported(name, "dynamo"))), path)
        return path
    case = MODELS[name]
    model = case.build().eval()
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(zlib.crc32(parameter.encode())))
            weight.copy_(drawn * 0.2 + (0.5 if weight.ndim == 1 else 0))
    args = tuple(inputs_of(name, 2).values())
    names = {"input_names": list(case.dims), "output_names": list(case.outputs)}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            dims = {one: torch.export.Dim(one) for one in ("batch", "sequence")}
            shapes: Any = tuple({axis: dims[one] for axis, one in axes.items()} for axes in case.dims.values())
            shapes = (shapes,) if isinstance(model, ByName) else shapes
            torch.onnx.export(
                model, args, path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False, **names
            )
        else:
            axes = {**case.dims, **{one: {0: "batch"} for one in case.outputs}}
            torch.onnx.export(model, args, path, dynamo=False, opset_version=17, dynamic_axes=axes, **names)
    return path
