"""transformers' pre-norm text encoders: T5, ModernBERT, CLIP's text tower."""

from __future__ import annotations

from typing import Any

import torch
from oracle import Stream
from torch import Tensor

from oracles.bert import attend, started


def t5(
    model: Any, family: Any, methods: Any, input_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[list[Tensor], Stream]:
    """-> [last_hidden_state]; a bias by distance of original positions, which all layers share."""
    encoder = model.encoder
    stream = started(model, family, methods, len(encoder.block), attention_mask)
    x = encoder.embed_tokens(input_ids)
    length = input_ids.shape[1]
    table = encoder.block[0].layer[0].SelfAttention.compute_bias(length, length)[0]
    for layer, block in enumerate(encoder.block):
        (first, second), attention = block.layer, block.layer[0].SelfAttention
        x = stream.cut("before_attention", layer, x)
        h, bias = first.layer_norm(x), stream.pairs(table, x.shape[0])
        mixed = attend(
            stream, h, attention.q, attention.k, attention.v, attention.key_value_proj_dim, scale=1.0, bias=bias
        )
        x = stream.cut("after_attention", layer, x + attention.o(mixed))
        mlp = second.DenseReluDense
        x = x + mlp.wo(mlp.wi(second.layer_norm(x)).relu())
        x = stream.cut("after_block", layer, x)
    return [stream.restore(encoder.final_layer_norm(x))], stream


def modernbert(
    model: Any, family: Any, methods: Any, input_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[list[Tensor], Stream]:
    """-> [last_hidden_state]; rotation and the window of local layers go by original positions."""
    config = model.config
    stream = started(model, family, methods, len(model.layers), attention_mask)
    x = model.embeddings(input_ids)
    places = torch.arange(input_ids.shape[1])
    near = (places[:, None] - places).abs() <= config.local_attention // 2
    window = torch.where(near, 0.0, -torch.inf).to(x.dtype)[None]
    for layer, block in enumerate(model.layers):
        kind, attention = config.layer_types[layer], block.attn
        x = stream.cut("before_attention", layer, x)
        q, k, v = attention.Wqkv(block.attn_norm(x)).unflatten(-1, (3, -1, attention.head_dim)).permute(2, 0, 3, 1, 4)
        tables = model.rotary_emb(x, places[None], kind)
        cos, sin = (stream.rows(table[0], x.shape[0])[:, None] for table in tables)
        bias = stream.pairs(window, x.shape[0]) if kind == "sliding_attention" else 0.0
        mixed = stream.attend(turned(q, cos, sin), turned(k, cos, sin), v, q.shape[-1] ** -0.5, raw_keys=k, bias=bias)
        x = stream.cut("after_attention", layer, x + attention.Wo(mixed))
        gate, up = block.mlp.Wi(block.mlp_norm(x)).chunk(2, -1)
        x = stream.cut("after_block", layer, x + block.mlp.Wo(block.mlp.act(gate) * up))
    return [stream.restore(model.final_norm(x))], stream


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel i and channel i + D/2 rotated by one angle, in float32 whatever the model is, as ModernBERT has it."""
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def clip_text(
    model: Any, family: Any, methods: Any, input_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[list[Tensor], Stream]:
    """-> [last_hidden_state, pooler_output]; causal by original positions, and the end-of-text token is pooled."""
    blocks = model.encoder.layers
    stream = started(model, family, methods, len(blocks), attention_mask, causal=True)
    x = model.embeddings(input_ids)
    length = input_ids.shape[1]
    later = torch.full((1, length, length), -torch.inf, dtype=x.dtype).triu(1)
    for layer, block in enumerate(blocks):
        attention = block.self_attn
        x = stream.cut("before_attention", layer, x)
        h, bias = block.layer_norm1(x), stream.pairs(later, x.shape[0])
        mixed = attend(stream, h, attention.q_proj, attention.k_proj, attention.v_proj, attention.head_dim, bias=bias)
        x = stream.cut("after_attention", layer, x + attention.out_proj(mixed))
        inner = block.mlp.fc1(block.layer_norm2(x))
        x = stream.cut("after_block", layer, x + block.mlp.fc2(inner * (1.702 * inner).sigmoid()))
    tokens = stream.restore(model.final_layer_norm(x))
    end = (input_ids == model.config.eos_token_id).int().argmax(1)
    return [tokens, tokens[torch.arange(len(end)), end]], stream
