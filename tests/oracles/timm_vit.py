"""timm's VisionTransformer family: plain, distilled, LayerScale, registers; class-token or mean pooling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from oracle import Stream
from torch import Tensor, nn


def timm_vit(model: Any, family: Any, methods: Any, images: Tensor) -> tuple[list[Tensor], Stream]:
    """Images [B, 3, H, W] -> [head output [B, K]]."""
    grid = tuple(map(int, model.patch_embed.grid_size))
    stream = Stream(methods, len(model.blocks), family.prefix, grid=grid)
    *_, x = blocks_of(model, stream, images)
    return [_head(model, model.norm(x), stream)], stream


def blocks_of(model: Any, stream: Stream, images: Tensor) -> Iterator[Tensor]:
    """The stream after every block."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for layer, block in enumerate(model.blocks):
        x = stream.cut("before_attention", layer, x)
        x = x + block.ls1(_attention(block.attn, block.norm1(x), stream))
        x = stream.cut("after_attention", layer, x)
        x = x + block.ls2(block.mlp.fc2(block.mlp.act(block.mlp.fc1(block.norm2(x)))))
        x = stream.cut("after_block", layer, x)
        yield x


def _attention(attn: Any, x: Tensor, stream: Stream) -> Tensor:
    batch, count, _ = x.shape
    query, key, value = attn.qkv(x).chunk(3, dim=-1)
    heads = [t.reshape(batch, count, attn.num_heads, attn.head_dim).transpose(1, 2) for t in (query, key, value)]
    q, k, v = attn.q_norm(heads[0]), attn.k_norm(heads[1]), heads[2]
    return attn.proj(stream.attend(q, k, v, attn.head_dim**-0.5, normed=x))


def _head(model: Any, x: Tensor, stream: Stream) -> Tensor:
    if isinstance(getattr(model, "head_dist", None), nn.Module):
        return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
    if getattr(model, "attn_pool", None) is not None:
        return model.head(model.fc_norm(_attention_pool(model.attn_pool, x, stream)))
    pooled = stream.mean(x) if model.global_pool == "avg" else x[:, 0]
    return model.head(model.fc_norm(pooled))


def _attention_pool(pool: Any, x: Tensor, stream: Stream) -> Tensor:
    """One learned query reads the tokens (SigLIP)."""
    latent = pool.q(pool.latent).expand(x.shape[0], -1, -1)
    q, k, v = (t.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2) for t in (latent, *pool.kv(x).chunk(2, -1)))
    y = pool.proj(stream.pool(q, k, v, pool.scale))
    return (y + pool.mlp(pool.norm(y)))[:, 0]
