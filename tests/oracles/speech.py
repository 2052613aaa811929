"""transformers' encoders of raw speech: Wav2Vec2, with its norm behind or in front, HuBERT, Data2Vec."""

from __future__ import annotations

from typing import Any

from oracle import Stream
from torch import Tensor

from oracles.hf_positions import projections


def speech(model: Any, family: Any, methods: Any, input_values: Tensor) -> tuple[list[Tensor], Stream]:
    """-> [last_hidden_state]."""
    model = getattr(model, "speech", model)
    encoder = model.encoder
    stream = Stream(methods, len(encoder.layers), family.prefix)
    projected = model.feature_projection(model.feature_extractor(input_values).transpose(1, 2))
    x = projected[0] if isinstance(projected, tuple) else projected
    x = x + encoder.pos_conv_embed(x)
    norm_first = getattr(model.config, "do_stable_layer_norm", False)
    x = x if norm_first else encoder.layer_norm(x)
    for i, layer in enumerate(encoder.layers):
        x = _before(stream, i, layer, x) if norm_first else _behind(stream, i, layer, x)
    return [stream.restore(x, encoder.layer_norm) if norm_first else stream.restore(x)], stream


def _mixed(stream: Stream, attention: Any, x: Tensor) -> Tensor:
    q, k, v = projections(attention, x, attention.head_dim)
    return attention.out_proj(stream.attend(q, k, v, attention.head_dim**-0.5))


def _before(stream: Stream, i: int, layer: Any, x: Tensor) -> Tensor:
    x = stream.cut("before_attention", i, x)
    x = stream.cut("after_attention", i, x + _mixed(stream, layer.attention, layer.layer_norm(x)))
    return stream.cut("after_block", i, x + layer.feed_forward(layer.final_layer_norm(x)))


def _behind(stream: Stream, i: int, layer: Any, x: Tensor) -> Tensor:
    x = stream.cut("before_attention", i, x)
    x = stream.cut("after_attention", i, layer.layer_norm(x + _mixed(stream, layer.attention, x)))
    return stream.cut("after_block", i, layer.final_layer_norm(x + layer.feed_forward(x)))
