"""The digits ViT: a plain timm VisionTransformer with the weights beside this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
WEIGHTS, CONFIG = HERE / "vit.safetensors", HERE / "vit.json"

ARCHITECTURE: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 4,  # 256 patches and a class token
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
}

STRIDE = 3  # of the waves, those that heads look by at first: 4 * (96 / 4 / 3) = 32, the width of a head
NEIGHBOURS = ((0, 1), (1, 0), (-1, -1))  # (rows, columns), one per head; every other layer looks the opposite way
SHARPNESS, NOISE = 2.0, 0.1


def untrained(generator: torch.Generator) -> Any:
    """A new model whose weights come from this generator.

    It starts as something like a convolutional network: positions are sines and cosines, and every head looks at a
    neighbour of its own (`_look_beside`).  The class token starts where no head looks, so it averages over all patches.
    Source of the idea: d'Ascoli et al., "ConViT", ICML 2021, arXiv 2103.10697; the construction is ours.
    """
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        model = VisionTransformer(**ARCHITECTURE)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        _start(name, parameter.data, generator)
    side, channels = ARCHITECTURE["img_size"] // ARCHITECTURE["patch_size"], ARCHITECTURE["embed_dim"]
    waves = torch.arange(side)[:, None] * _frequencies(channels)
    one = torch.cat([waves.sin(), waves.cos()], 1)
    grid = torch.cat([one[:, None].expand(side, side, -1), one[None].expand(side, side, -1)], 2)
    model.pos_embed.data[0, 1:] = grid.reshape(side * side, channels)
    model.cls_token.data[:] = torch.randn(channels, generator=generator)
    model.cls_token.data[..., ::STRIDE] = 0
    for layer, block in enumerate(model.blocks):
        for head, offset in enumerate(NEIGHBOURS):
            _look_beside(block.attn, head, [step * (-1) ** layer for step in offset])
    return model


def trained() -> Any:
    """The committed model, in float32 and evaluation mode."""
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**json.loads(CONFIG.read_text())["architecture"])
    model.load_state_dict(load_file(WEIGHTS))  # the file holds half precision; copying widens it
    return model.eval()


def save(model: Any, facts: dict[str, Any], folder: Path) -> None:
    """Weights in half precision and the configuration with the facts of the training, under their usual names."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in sorted(model.state_dict().items())}
    save_file(weights, folder / WEIGHTS.name)
    (folder / CONFIG.name).write_text(json.dumps({"architecture": ARCHITECTURE, **facts}, indent=1) + "\n")


def _start(name: str, value: torch.Tensor, generator: torch.Generator) -> None:
    """Norms start as the identity, biases and the head at zero, everything else small and normal."""
    if name.endswith("bias") or name.startswith("head"):
        value.zero_()
    elif "norm" in name:
        value.fill_(1)
    elif name.startswith("blocks"):
        value.normal_(0, 0.5 * value.shape[1] ** -0.5, generator=generator)
    else:
        value.normal_(0, value[0].numel() ** -0.5, generator=generator)


def _frequencies(channels: int) -> torch.Tensor:
    """Radians per patch of a quarter of the channels, falling tenfold."""
    return 1.5 * 10.0 ** (-torch.arange(channels // 4) / (channels // 4))


def _look_beside(attention: Any, head: int, offset: list[int]) -> None:
    """Let a head attend to the patch `offset` (rows, columns) away, by every STRIDE-th wave of the positions.

    For a wave of frequency f, q = (sin fp, cos fp) of the query's place and k = (sin f(p-d), cos f(p-d)) of the key's
    give q.k = cos f(p_key - p_query - d), which is largest at distance d.
    """
    channels, width = attention.qkv.in_features, attention.head_dim
    quarter, weight = channels // 4, attention.qkv.weight.data
    query, key = weight[head * width :][:width], weight[channels + head * width :][:width]
    query *= NOISE
    key *= NOISE
    for axis, distance in enumerate(offset):
        for wave, channel in enumerate(range(0, quarter, STRIDE)):
            sine, cosine = 2 * axis * quarter + channel, (2 * axis + 1) * quarter + channel
            turn = _frequencies(channels)[channel] * distance
            row = 2 * (axis * (quarter // STRIDE) + wave)
            query[row, sine] = query[row + 1, cosine] = SHARPNESS
            key[row, sine] = key[row + 1, cosine] = SHARPNESS * turn.cos()
            key[row, cosine], key[row + 1, sine] = -SHARPNESS * turn.sin(), SHARPNESS * turn.sin()
