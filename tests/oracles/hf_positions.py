"""transformers' vision encoders whose attention knows positions (DINOv3, BEiT) or whose head is attention (SigLIP)."""

from __future__ import annotations

from typing import Any

import torch
from oracle import Stream
from torch import Tensor

from oracles.timm_positions import rotation, turn


def hf_dinov3(model: Any, family: Any, methods: Any, pixel_values: Tensor) -> tuple[list[Tensor], Stream]:
    """-> [last_hidden_state, pooler_output]."""
    blocks = model.model.layer
    stream = Stream(methods, len(blocks), family.prefix)
    x = model.embeddings(pixel_values)
    cos, sin = model.rope_embeddings(pixel_values)
    sin, cos = rotation(torch.cat([sin, cos], -1), family.prefix)
    for layer, block in enumerate(blocks):
        attention = block.attention
        x = stream.cut("before_attention", layer, x)
        q, k, v = projections(attention, block.norm1(x), attention.head_dim)
        now = [stream.rows(table, x.shape[0])[:, None] for table in (sin, cos)]
        mixed = stream.attend(turn(q, *now, half=True), turn(k, *now, half=True), v, attention.scaling, raw_keys=k)
        x = stream.cut("after_attention", layer, x + attention.o_proj(mixed) * block.layer_scale1.lambda1)
        mlp = block.mlp
        x = x + mlp.down_proj(mlp.act_fn(mlp.up_proj(block.norm2(x)))) * block.layer_scale2.lambda1
        x = stream.cut("after_block", layer, x)
    x = model.norm(x)
    return [stream.restore(x), x[:, 0]], stream


def hf_beit(model: Any, family: Any, methods: Any, pixel_values: Tensor) -> tuple[list[Tensor], Stream]:
    """-> [last_hidden_state, pooler_output]; a bias per layer and one that all layers share."""
    stream = Stream(methods, len(model.layers), family.prefix)
    window = (model.config.image_size // model.config.patch_size,) * 2
    x = model.embeddings(pixel_values)
    for layer, block in enumerate(model.layers):
        attention = block.attention
        x = stream.cut("before_attention", layer, x)
        q, k, v = projections(attention, block.layernorm_before(x), attention.head_dim)
        table = sum(
            bias.relative_position_bias_table[bias.generate_relative_position_index(window)].permute(2, 0, 1)
            for bias in (block.relative_position_bias, model.shared_position_bias)
            if bias is not None
        )
        mixed = stream.attend(q, k, v, attention.scaling, bias=stream.pairs(table, x.shape[0]))
        x = stream.cut("after_attention", layer, x + attention.o_proj(mixed) * block.lambda_1)
        mlp = block.mlp
        x = x + mlp.fc2(mlp.activation_fn(mlp.fc1(block.layernorm_after(x)))) * block.lambda_2
        x = stream.cut("after_block", layer, x)
    x = model.layernorm(x)
    pooled = x[:, 0] if model.pooler.layernorm is None else model.pooler.layernorm(stream.mean(x))
    return [stream.restore(x), pooled], stream


def hf_siglip(model: Any, family: Any, methods: Any, pixel_values: Tensor) -> tuple[list[Tensor], Stream]:
    """-> [last_hidden_state, pooler_output]."""
    blocks = model.encoder.layers
    stream = Stream(methods, len(blocks), family.prefix)
    x = model.embeddings(pixel_values)
    for layer, block in enumerate(blocks):
        attention = block.self_attn
        x = stream.cut("before_attention", layer, x)
        q, k, v = projections(attention, block.layer_norm1(x), attention.head_dim)
        x = x + attention.out_proj(stream.attend(q, k, v, attention.head_dim**-0.5))
        x = stream.cut("after_attention", layer, x)
        mlp = block.mlp
        x = x + mlp.fc2(mlp.activation_fn(mlp.fc1(block.layer_norm2(x))))
        x = stream.cut("after_block", layer, x)
    x = model.post_layernorm(x)
    return [stream.restore(x), _siglip_pool(model.head, x, stream)], stream


def _siglip_pool(head: Any, x: Tensor, stream: Stream) -> Tensor:
    """One learned query reads the tokens."""
    attention, heads = head.attention, head.attention.num_heads
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    inputs = (head.probe.expand(x.shape[0], -1, -1), x, x)
    q, k, v = (
        (given @ w.T + b).unflatten(-1, (heads, -1)).transpose(1, 2)
        for given, w, b in zip(inputs, weights, biases, strict=True)
    )
    pooled = attention.out_proj(stream.pool(q, k, v, q.shape[-1] ** -0.5))
    mlp = head.mlp
    return (pooled + mlp.fc2(mlp.activation_fn(mlp.fc1(head.layernorm(pooled)))))[:, 0]


def projections(attention: Any, x: Tensor, head_dim: int) -> list[Tensor]:
    """Queries, keys and values [B, H, N, D]."""
    return [
        project(x).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
