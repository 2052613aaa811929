"""transformers' plain encoders: DINOv2, DeiT, ViTMAE, VideoMAE, AST and the Whisper encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from oracle import Stream
from torch import Tensor, nn

from oracles.hf_positions import projections

Answer = tuple[list[Tensor], Stream]


def hf_plain(model: Any, family: Any, methods: Any, **inputs: Tensor) -> Answer:
    """-> the model's outputs: tokens and what is pooled from them, or the scores of its head."""
    body = next((getattr(model, n) for n in NAMES if hasattr(model, n)), model)
    embedded = body.embeddings(*inputs.values(), *[None] * (type(body).__name__ == "VideoMAEModel"))
    x, *others = embedded if isinstance(embedded, tuple) else (embedded,)
    blocks = getattr(getattr(body, "encoder", None), "layer", None) or body.layers
    stream = Stream(methods, len(blocks), family.prefix)
    x = list(states(stream, blocks, x))[-1]
    norm = getattr(body, "layernorm", None) or nn.Identity()
    return [*_head(model, body, norm(x), stream.restore(x, norm), stream), *(others if body is model else [])], stream


NAMES = ("dinov2", "deit", "videomae", "vit", "audio_spectrogram_transformer")


def states(
    stream: Stream, blocks: Any, x: Tensor, between: Callable[[int, Tensor], Tensor] = lambda _, x: x
) -> Iterator[Tensor]:
    """The stream after every block; `between` is what the model does to it before a block."""
    for layer, block in enumerate(blocks):
        x = between(layer, x)
        norms = [getattr(block, a, None) or getattr(block, b) for a, b in zip(BEFORE, AFTER, strict=True)]
        scales = [getattr(block, name, nn.Identity()) for name in ("layer_scale1", "layer_scale2")]
        x = stream.cut("before_attention", layer, x)
        x = x + scales[0](_attention(block.attention, norms[0](x), stream))
        x = stream.cut("after_attention", layer, x)
        x = x + scales[1](_mlp(block, norms[1](x)))
        x = stream.cut("after_block", layer, x)
        yield x


BEFORE, AFTER = ("norm1", "norm2"), ("layernorm_before", "layernorm_after")


def _attention(attention: Any, x: Tensor, stream: Stream) -> Tensor:
    if hasattr(attention, "q_proj"):
        q, k, v = projections(attention, x, attention.head_dim)
        return attention.o_proj(stream.attend(q, k, v, attention.head_dim**-0.5))
    inner = attention.attention
    size = inner.attention_head_size
    q, k, v = (p(x).unflatten(-1, (-1, size)).transpose(1, 2) for p in (inner.query, inner.key, inner.value))
    return attention.output.dense(stream.attend(q, k, v, size**-0.5))


def _mlp(block: Any, x: Tensor) -> Tensor:
    if not hasattr(block, "mlp"):
        return block.output.dense(block.intermediate.intermediate_act_fn(block.intermediate.dense(x)))
    mlp = block.mlp
    if hasattr(mlp, "gate_proj"):
        return mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    return mlp.fc2(mlp.activation_fn(mlp.fc1(x)))


def _head(model: Any, body: Any, x: Tensor, whole: Tensor, stream: Stream) -> list[Tensor]:
    """Class tokens, means of what the slots stand for, or the tokens themselves at full length."""
    if hasattr(model, "distillation_classifier"):
        both = [model.cls_classifier(x[:, 0]), model.distillation_classifier(x[:, 1])]
        return [(both[0] + both[1]) / 2, *both]
    if hasattr(model, "fc_norm"):
        return [model.classifier(model.fc_norm(stream.mean(x)))]
    if hasattr(model, "dinov2"):
        return [model.classifier(torch.cat([x[:, 0], stream.mean(x)], -1))]
    if hasattr(model, "audio_spectrogram_transformer"):
        head = model.classifier
        return [head.dense(head.layernorm((x[:, 0] + x[:, 1]) / 2))]
    pooled = {
        "Dinov2Model": lambda: [x[:, 0]],
        "Dinov2WithRegistersModel": lambda: [x[:, 0]],
        "DeiTModel": lambda: [body.pooler.activation(body.pooler.dense(x[:, 0]))],
        "VivitModel": lambda: [body.pooler.activation(body.pooler.dense(x[:, 0]))],
        "ASTModel": lambda: [(x[:, 0] + x[:, 1]) / 2],
    }
    return [whole, *pooled.get(type(model).__name__, list)()]


def whisper(model: Any, family: Any, methods: Any, input_features: Tensor) -> Answer:
    """-> [last_hidden_state]; queries are scaled before attention, which then has no scale."""
    stream = Stream(methods, len(model.layers), family.prefix)
    x = nn.functional.gelu(model.conv2(nn.functional.gelu(model.conv1(input_features)))).transpose(1, 2)
    x = x + model.embed_positions.weight
    for layer, block in enumerate(model.layers):
        attention = block.self_attn
        x = stream.cut("before_attention", layer, x)
        q, k, v = projections(attention, block.self_attn_layer_norm(x), attention.head_dim)
        x = x + attention.out_proj(stream.attend(q * attention.head_dim**-0.5, k, v, 1.0))
        x = stream.cut("after_attention", layer, x)
        x = x + block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(x))))
        x = stream.cut("after_block", layer, x)
    return [stream.restore(model.layer_norm(x))], stream


def vit_mae_pretraining(model: Any, family: Any, methods: Any, pixel_values: Tensor, noise: Tensor) -> Answer:
    """-> [loss, logits, mask, ids_restore]: the decoder, a stream of its own, runs on the restored encoder."""
    (latent, mask, order), stream = hf_plain(model.vit, family, methods, pixel_values=pixel_values, noise=noise)
    logits = model.decoder(latent, order).logits
    error = (logits - model.patchify(pixel_values)).square().mean(-1)
    return [(error * mask).sum() / mask.sum(), logits, mask, order], stream
