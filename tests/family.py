"""What a family of models is, how its weights are drawn and its inputs made.  The only place that draws weights.

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

from tamis.rewrite import parse_passes

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
        """Whether the methods of a recipe can run on it; all that score by a class token are as EViT."""
        scored = any(getattr(one, "needs_class_token", False) for one in parse_passes(passes))
        return not ("evit" in self.without and scored)

    def model(self, dtype: torch.dtype = torch.float32, layers: int | None = None) -> nn.Module:
        """A fresh module; the same weights every time."""
        return draw(self.build(layers or self.layers)).to(dtype).eval()

    def shared(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """One module for all tests; do not change it."""
        return _shared(self, dtype)


@cache
def _shared(family: Family, dtype: torch.dtype) -> nn.Module:
    return family.model(dtype)


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
    pad: int | None = None,
    end: int | None = None,
    **_: Any,
) -> Inputs:
    """Random token ids [batch, length + extra] with their attention mask, int64.

    Row i has `length - 5 * (i % 3)` real tokens, whatever padding is; padding=None makes them all real.  `extra` adds
    padding to every row.  Ids of padding are `pad`, or random, so that reading them is noticed; the last real token of
    each row is `end` where it is given.
    """
    generator = torch.Generator().manual_seed(2000 + seed)
    ids = torch.stack([torch.randint(5, 60, (length,), generator=generator) for _ in range(batch)])
    real = [length if padding is None else length - 5 * (i % 3) for i in range(batch)]
    noise = torch.Generator().manual_seed(3000 + seed + extra)
    padded, masks = [], []
    for row, n in zip(ids, real, strict=True):
        fill = torch.randint(5, 60, (length + extra - n,), generator=noise)
        fill = fill if pad is None else torch.full_like(fill, pad)
        if end is not None:
            row[n - 1] = end
        ones, zeros = torch.ones(n, dtype=torch.int64), torch.zeros(length + extra - n, dtype=torch.int64)
        order = (lambda a, b: (b, a)) if padding == "left" else (lambda a, b: (a, b))
        padded.append(torch.cat(order(row[:n], fill)))
        masks.append(torch.cat(order(ones, zeros)))
    kwargs = {"input_ids": torch.stack(padded)}
    return (), {**kwargs, "attention_mask": torch.stack(masks)} if mask else kwargs


def plain_text_inputs(batch: int, **options: Any) -> Inputs:
    """Token ids without a mask."""
    return text_inputs(batch, **{**options, "padding": None, "mask": False})
