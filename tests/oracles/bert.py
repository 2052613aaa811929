"""transformers' BERT: post-norm blocks, padding masks."""

from __future__ import annotations

from typing import Any

from oracle import Stream
from torch import Tensor


def bert(
    model: Any, family: Any, methods: Any, input_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[list[Tensor], Stream]:
    """-> [last_hidden_state, pooler_output].

    The pooler reads what stands first: after a reduction that is each row's first real token, even where the padding
    was on the left.
    """
    valid = None if attention_mask is None else attention_mask.bool()
    blocks = model.encoder.layer
    stream = Stream(methods, len(blocks), family.prefix, valid=valid)
    x = model.embeddings(input_ids)
    for layer, block in enumerate(blocks):
        x = stream.cut("before_attention", layer, x)
        output = block.attention.output
        x = output.LayerNorm(output.dense(_attend(block.attention.self, x, stream)) + x)
        x = stream.cut("after_attention", layer, x)
        inner = block.intermediate.intermediate_act_fn(block.intermediate.dense(x))
        x = block.output.LayerNorm(block.output.dense(inner) + x)
        x = stream.cut("after_block", layer, x)
    return [stream.restore(x), model.pooler.activation(model.pooler.dense(x[:, 0]))], stream


def _attend(attention: Any, x: Tensor, stream: Stream) -> Tensor:
    batch, count, _ = x.shape
    size = attention.attention_head_size
    q, k, v = (
        proj(x).reshape(batch, count, -1, size).transpose(1, 2)
        for proj in (attention.query, attention.key, attention.value)
    )
    return stream.attend(q, k, v, size**-0.5)
