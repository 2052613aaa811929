"""Hugging Face models: from a directory, the local cache or the hub; safetensors only, no code of the model's own."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import (
    CorruptModel,
    ExampleInputsMissing,
    ModelNotFound,
    PickleRefused,
    UnknownModelFormat,
    UnknownModelName,
)

LENGTH = 16  # tokens of the example text
BATCH = 2


def load_hf(name: str, transformers: ModuleType) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in eval mode and example inputs of batch 2 (images of the config's size, or 16 tokens).

    The class is the head that config.json names (image or sequence classification, ...), else the bare model.  Nothing
    is fetched when `name` is a directory or HF_HUB_OFFLINE is set.

    Raises:
        UnknownModelName: no such model in the cache or on the hub.
        PickleRefused: its weights are only there as a pickle.
        UnknownModelFormat: its class is not part of transformers.
        CorruptModel: config or weights cannot be read.
        ExampleInputsMissing: it takes neither images nor text.
    """
    is_local = Path(name).is_dir()
    if is_local:
        _refuse_pickles(Path(name))
    options = {"local_files_only": is_local or _offline(), "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **options)
        auto = _auto_class(transformers, config)
        model = auto.from_pretrained(name, config=config, use_safetensors=True, **options)
    except Exception as error:
        raise _explained(name, is_local, error) from error
    return model.eval(), _example(model, f"hf:{name}")


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _refuse_pickles(path: Path) -> None:
    if any(path.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in path.glob(pattern))
    if pickles:
        raise PickleRefused(path=path, member=pickles[0], reason="only safetensors are read")
    raise ModelNotFound(path=path / "model.safetensors", hint="save the model there with model.save_pretrained(dir).")


def _auto_class(transformers: ModuleType, config: Any) -> Any:
    """AutoModelForX for an architecture XxxForX, AutoModel for others."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    _, found, head = architecture.partition("For")
    return getattr(transformers, f"AutoModelFor{head}", transformers.AutoModel) if found else transformers.AutoModel


def _explained(name: str, is_local: bool, error: Exception) -> Exception:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text or "does not recognize this architecture" in text or "Unrecognized model" in text:
        known = "a model whose class is part of transformers; code that comes with a model is never run"
        return UnknownModelFormat(path=f"hf:{name}", accepted=known)
    if "safetensors" in text and not is_local and isinstance(error, OSError):
        return PickleRefused(path=f"hf:{name}", member="pytorch_model.bin", reason="only safetensors are read")
    if isinstance(error, OSError) and not is_local:
        hint = "give a directory with config.json and model.safetensors, or an id that is in the cache or on the hub."
        return UnknownModelName(path=f"hf:{name}", reason="no such model in the local cache or on the hub", hint=hint)
    reason = f"{type(error).__name__}: {text[:160]}".rstrip(".")
    return CorruptModel(path=name, kind="a Hugging Face model", reason=reason)


def _example(model: Any, name: str) -> dict[str, Tensor]:
    config, dtype = model.config, model.dtype
    takes = getattr(model, "main_input_name", "")
    vision, text = getattr(config, "vision_config", None), getattr(config, "text_config", None)
    if vision is not None and text is not None:
        return {**_text(text), **_image(vision, dtype)}
    if takes == "pixel_values" and hasattr(config, "image_size"):
        return _image(config, dtype)
    if takes == "input_ids":
        return _text(config)
    raise ExampleInputsMissing(model=name, hint=f"it takes {takes or 'unknown inputs'}; pass args or kwargs.")


def _image(config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = (BATCH, getattr(config, "num_channels", 3), height, width)
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)}


def _text(config: Any) -> dict[str, Tensor]:
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    generator = torch.Generator().manual_seed(0)
    # the lower half holds the special tokens, padding among them
    ids = torch.randint(config.vocab_size // 2, config.vocab_size, (BATCH, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
