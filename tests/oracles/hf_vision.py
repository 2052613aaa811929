"""transformers' ViT (model and classifier) and CLIP vision tower."""

from __future__ import annotations

from typing import Any

from oracle import Stream
from torch import Tensor


def hf_vit(model: Any, family: Any, methods: Any, pixel_values: Tensor) -> tuple[list[Tensor], Stream]:
    """-> [last_hidden_state, pooler_output], or [logits] of a classifier."""
    body = getattr(model, "vit", model)
    stream = Stream(methods, len(body.layers), family.prefix)
    x = body.embeddings(pixel_values)
    for layer, block in enumerate(body.layers):
        attention = block.attention
        x = stream.cut("before_attention", layer, x)
        h = block.layernorm_before(x)
        mixed = _attend(stream, h, attention.q_proj, attention.k_proj, attention.v_proj, attention.head_dim)
        x = stream.cut("after_attention", layer, x + attention.o_proj(mixed))
        mlp = block.mlp
        x = x + mlp.fc2(mlp.activation_fn(mlp.fc1(block.layernorm_after(x))))
        x = stream.cut("after_block", layer, x)
    x = body.layernorm(x)
    if body is not model:
        return [model.classifier(x[:, 0])], stream
    return [stream.restore(x), body.pooler.activation(body.pooler.dense(x[:, 0]))], stream


def clip(model: Any, family: Any, methods: Any, pixel_values: Tensor) -> tuple[list[Tensor], Stream]:
    """-> [last_hidden_state, pooler_output]."""
    blocks = model.encoder.layers
    stream = Stream(methods, len(blocks), family.prefix)
    x = model.pre_layrnorm(model.embeddings(pixel_values))
    for layer, block in enumerate(blocks):
        attention = block.self_attn
        x = stream.cut("before_attention", layer, x)
        h = block.layer_norm1(x)
        mixed = _attend(stream, h, attention.q_proj, attention.k_proj, attention.v_proj, attention.head_dim)
        x = stream.cut("after_attention", layer, x + attention.out_proj(mixed))
        mlp = block.mlp
        x = x + mlp.fc2(mlp.activation_fn(mlp.fc1(block.layer_norm2(x))))
        x = stream.cut("after_block", layer, x)
    return [stream.restore(x), model.post_layernorm(x[:, 0])], stream


def _attend(stream: Stream, x: Tensor, query: Any, key: Any, value: Any, head_dim: int) -> Tensor:
    batch, count, _ = x.shape
    q, k, v = (proj(x).reshape(batch, count, -1, head_dim).transpose(1, 2) for proj in (query, key, value))
    return stream.attend(q, k, v, head_dim**-0.5)
