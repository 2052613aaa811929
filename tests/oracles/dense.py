"""Models with a dense or detection head: the stream by hand, and every token back where the head needs it."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from oracle import Stream, apply_plan
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers.modeling_outputs import BaseModelOutput

from oracles.hf_plain import states
from oracles.hf_positions import projections
from oracles.timm_vit import blocks_of

Answer = tuple[list[Tensor], Stream]


def dpt(model: Any, family: Any, methods: Any, pixel_values: Tensor) -> Answer:
    """-> [depth or logits]: neck and head read every block's state, restored as it was then."""
    body = model.dpt
    stream = Stream(methods, len(body.encoder.layer), family.prefix)
    x = body.embeddings(pixel_values)
    x = getattr(x, "last_hidden_states", x)
    features = [stream.restore(state) for state in states(stream, body.encoder.layer, x)]
    size = model.config.image_size // model.config.patch_size
    return [model.head(model.neck(features, size, size))], stream


def depth_anything(model: Any, family: Any, methods: Any, pixel_values: Tensor) -> Answer:
    """-> [depth]: as DPT, each state through the encoder's last norm."""
    body = model.backbone
    blocks = getattr(body, "layers", None) or body.encoder.layer
    stream = Stream(methods, len(blocks), family.prefix)
    features = [
        stream.restore(state, body.layernorm) for state in states(stream, blocks, body.embeddings(pixel_values))
    ]
    size = pixel_values.shape[-1] // model.config.patch_size
    return [model.head(model.neck(features, size, size), size, size)], stream


def timm_maps(model: Any, family: Any, methods: Any, images: Tensor) -> Answer:
    """-> [map [B, C, 4, 4] of every block]."""
    body = getattr(model, "vit", None) or model.model
    stream = Stream(methods, len(body.blocks), family.prefix)
    maps = []
    for state in blocks_of(body, stream, images):
        patches = stream.restore(state)[:, family.prefix :]
        maps.append(patches.transpose(1, 2).unflatten(2, body.patch_embed.grid_size))
    return maps, stream


def detr(model: Any, family: Any, methods: Any, pixel_values: Tensor) -> Answer:
    """-> the model's outputs, its encoder by hand: the decoder reads full tokens, sizes and drops in its keys apart.

    Positions are added to queries and keys of every layer, so they lose what the stream loses.
    """
    stream = Stream(methods, len(model.model.encoder.layers), family.prefix)
    encoder, crossings = model.model.encoder, [layer.encoder_attn for layer in model.model.decoder.layers]
    places: list[Tensor] = []

    def encode(inputs_embeds: Tensor, attention_mask: Tensor, spatial_position_embeddings: Tensor, **_: Any) -> Any:
        assert bool(attention_mask.all())
        x = inputs_embeds
        for i, layer in enumerate(encoder.layers):
            x = _detr_layer(stream, i, layer, x, spatial_position_embeddings)
        places.append(spatial_position_embeddings)
        return BaseModelOutput(last_hidden_state=x)

    def crossing(attention: Any) -> Any:
        def attend(hidden_states: Tensor, key_value_states: Tensor, **given: Any) -> tuple[Tensor, None]:
            positions = given["encoder_position_embeddings"]
            queries = hidden_states + given["position_embeddings"]
            keys = key_value_states + _of_now(stream, positions)
            q, k, v = (
                proj(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for proj, x in (
                    (attention.q_proj, queries),
                    (attention.k_proj, keys),
                    (attention.v_proj, key_value_states),
                )
            )
            return attention.o_proj(stream.pool(q, k, v, attention.scaling)), None

        return attend

    with patch.object(encoder, "forward", encode):
        for attention in crossings:
            attention.forward = crossing(attention)
        try:
            out = model(pixel_values=pixel_values)
        finally:
            for attention in crossings:
                del attention.forward
    out["encoder_last_hidden_state"] = stream.restore(out["encoder_last_hidden_state"])
    return tree_leaves(out), stream


def _detr_layer(stream: Stream, i: int, layer: Any, x: Tensor, positions: Tensor) -> Tensor:
    attention = layer.self_attn
    x = stream.cut("before_attention", i, x)
    place = _of_now(stream, positions)
    q, k, _ = projections(attention, x + place, attention.head_dim)
    v = projections(attention, x, attention.head_dim)[2]
    x = layer.self_attn_layer_norm(x + attention.o_proj(stream.attend(q, k, v, attention.scaling)))
    x = stream.cut("after_attention", i, x)
    return stream.cut("after_block", i, layer.final_layer_norm(x + layer.mlp(x)))


def _of_now(stream: Stream, x: Tensor) -> Tensor:
    """Rows [B, N0, C] of the original tokens, those of the leaders."""
    if stream.leaders is None:
        return x
    return torch.stack([row[index] for row, index in zip(x, stream.leaders, strict=True)])


def yolos(model: Any, family: Any, methods: Any, pixel_values: Tensor) -> Answer:
    """-> [logits, boxes, last_hidden_state]: of the last tokens, which stand at the end once all are back."""
    body = model.vit
    stream = Stream(methods, len(body.encoder.layer), family.prefix)
    size = tuple(pixel_values.shape[-2:])
    tables = None if body.encoder.interpolation is None else body.encoder.interpolation(size)

    def between(layer: int, x: Tensor) -> Tensor:
        return x if tables is None or layer == 0 else x + stream.rows(tables[layer - 1][0], x.shape[0])

    *_, x = states(stream, body.encoder.layer, body.embeddings(pixel_values), between)
    whole = stream.restore(x, body.layernorm)
    found = whole[:, -model.config.num_detection_tokens :]
    return [model.class_labels_classifier(found), model.bbox_predictor(found).sigmoid(), whole], stream


def segformer(model: Any, family: Any, methods: Any, pixel_values: Tensor) -> Answer:
    """-> [logits]: in the last stage tokens leave behind attention and are back for the convolution in every MLP."""
    *before, last = model.segformer.stages
    maps, x = [], pixel_values
    for stage in before:
        x = stage(x)
        x = x if isinstance(x, Tensor) else x[0]
        maps.append(x)
    stream = Stream(methods, len(last.blocks), family.prefix)
    x, height, width = last.patch_embeddings(x)
    for i, block in enumerate(last.blocks):
        x = _segformer_block(stream, i, block, x, height, width)
    x = last.layer_norm(x)
    maps.append(x.transpose(1, 2).unflatten(2, (height, width)))
    return [model.decode_head(maps)], stream


def _segformer_block(stream: Stream, i: int, block: Any, x: Tensor, height: int, width: int) -> Tensor:
    """Attention sees all tokens, since the block before ended with all of them."""
    attention, mlp = block.attention, block.mlp
    q, k, v = projections(attention, block.layernorm_before(x), attention.head_dim)
    mixed = (q @ k.transpose(-1, -2) * attention.scaling).softmax(-1) @ v
    x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    if stream.leaders is not None:
        q, k, v = (
            torch.stack([heads[:, index] for heads, index in zip(t, stream.leaders, strict=True)]) for t in (q, k, v)
        )
    stream.attend(q, k, v, attention.scaling)  # what the method sees
    stream.last = None if stream.last is None else x
    for plan in stream.plans:
        x = apply_plan(plan, x)
    x = stream.cut("after_attention", i, x)
    hidden = stream.restore(x, lambda state: mlp.fc1(block.layernorm_after(state)))
    grid = mlp.dwconv.dwconv(hidden.transpose(1, 2).unflatten(2, (height, width)))
    return stream.restore(x) + mlp.fc2(mlp.activation_fn(grid.flatten(2).transpose(1, 2)))
