"""Causal language models with a key-value cache, captured as their prefill: the cache comes out as plain tensors.

A Hugging Face model returns its cache as an object, which no graph can hold, and is told by whoever generates text with
it where its tokens stand.  `as_prefill` makes a module of the same weights that does both itself.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

log = logging.getLogger("tamis")
KEYS_AND_VALUES = ("DynamicLayer", "DynamicSlidingWindowLayer")  # the layers of transformers' caches that hold no more


def as_prefill(model: nn.Module, name: str = "model") -> nn.Module:
    """The prefill of a decoder (see `is_decoder`); any other model as it is.

    The prefill is called and answers as the model does, with two differences:

    - `past_key_values` is a tuple of (keys, values) of every layer, [B, kv heads, N, D], keys as attention used them
      (rotated); layers with a window give all N of them too.  `DynamicCache(out.past_key_values, config=model.config)`
      is the cache to decode on from.
    - `position_ids`, where the caller gives a mask [B, N] but no positions, count the real tokens of each row, as
      `generate` has it: padding on the left moves no token.  Padding stands at 0.

    Weights, their names and the paths of modules are the model's, which is not changed.  A decoder whose cache holds
    more than keys and values is returned as it is, with a warning of the logger "tamis": its graph returns no cache.
    """
    if not is_decoder(model):
        return model
    if any(type(layer).__name__ not in KEYS_AND_VALUES for layer in _new_cache(model).layers):
        log.warning("%s: its cache holds more than keys and values, so the captured graph returns no cache", name)
        return model
    prefill = copy.copy(model)
    prefill.forward = _prefilling(model)  # type: ignore[method-assign]
    return prefill


def is_decoder(model: nn.Module) -> bool:
    """Whether `forward` takes `past_key_values`, the config says `use_cache`, and an attention module `is_causal`."""
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", None) is not True or getattr(config, "is_encoder_decoder", False):
        return False
    takes_cache = "past_key_values" in inspect.signature(model.forward).parameters
    return takes_cache and any(getattr(module, "is_causal", False) is True for module in model.modules())


def _prefilling(model: nn.Module) -> Any:
    """The model's forward from an empty cache; `wraps` keeps its signature, which names the inputs of the graph."""
    signature = inspect.signature(model.forward)

    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        cache = _new_cache(model)
        for layer in cache.layers:
            layer.update = functools.partial(_keep, layer)
        given.arguments.update(past_key_values=cache, use_cache=True)
        if "position_ids" in signature.parameters and given.arguments.get("position_ids") is None:
            given.arguments["position_ids"] = _positions(given.arguments)
        result = model.forward(*given.args, **given.kwargs)
        return _with_pairs(result, cache, tuple((layer.keys, layer.values) for layer in cache.layers))

    return forward


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _keep(layer: Any, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """In place of a layer's `update`, which would append to an empty tensor and cut to the window."""
    layer.keys, layer.values = keys, values
    return keys, values


def _positions(given: Mapping[str, Any]) -> Tensor | None:
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def _with_pairs(result: Any, cache: Any, pairs: tuple[Any, ...]) -> Any:
    """The model's result, a mapping with fields or a tuple, with the pairs where the cache was."""
    if isinstance(result, tuple):
        return tuple(pairs if one is cache else one for one in result)
    for key, value in result.items():
        if value is cache:
            result[key] = pairs
    return result
