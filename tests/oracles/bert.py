"""transformers' post-norm text encoders: BERT and its heads, RoBERTa, XLM-R, ELECTRA, DistilBERT, ALBERT, MPNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oracle import Stream
from torch import Tensor, tanh

Apply = Callable[[Tensor], Tensor]


def post_norm_block(stream: Stream, layer: int, x: Tensor, mix: Apply, norm: Apply, mlp: Apply, last: Apply) -> Tensor:
    """norm(x + mix(x)), then last(x + mlp(x)); the cuts lie behind the norms."""
    x = stream.cut("before_attention", layer, x)
    x = stream.cut("after_attention", layer, norm(x + mix(x)))
    return stream.cut("after_block", layer, last(x + mlp(x)))


def attend(stream: Stream, x: Tensor, query: Apply, key: Apply, value: Apply, size: int, **options: Any) -> Tensor:
    """Attention of projections into heads of `size` channels; scale 1/sqrt(size) unless said otherwise."""
    q, k, v = (proj(x).reshape(*x.shape[:2], -1, size).transpose(1, 2) for proj in (query, key, value))
    return stream.attend(q, k, v, options.pop("scale", size**-0.5), normed=x, **options)


def started(model: Any, family: Any, methods: Any, layers: int, mask: Tensor | None, **options: Any) -> Stream:
    """The stream of a text encoder under a padding mask."""
    return Stream(methods, layers, family.prefix, valid=None if mask is None else mask.bool(), **options)


def bert(
    model: Any, family: Any, methods: Any, input_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[list[Tensor], Stream]:
    """-> [last_hidden_state, pooler_output if there is a pooler], or [logits] of a head.

    The pooler reads what stands first: after a reduction that is each row's first real token, even where the padding
    was on the left.
    """
    body = getattr(model, model.base_model_prefix, model)
    blocks = body.encoder.layer
    stream = started(model, family, methods, len(blocks), attention_mask)
    x = body.embeddings(input_ids)
    if hasattr(body, "embeddings_project"):
        x = body.embeddings_project(x)
    for layer, block in enumerate(blocks):
        attention, output = block.attention.self, block.attention.output
        size = attention.attention_head_size

        def mix(x: Tensor, attention: Any = attention, output: Any = output, size: int = size) -> Tensor:
            return output.dense(attend(stream, x, attention.query, attention.key, attention.value, size))

        def mlp(x: Tensor, block: Any = block) -> Tensor:
            return block.output.dense(block.intermediate.intermediate_act_fn(block.intermediate.dense(x)))

        x = post_norm_block(stream, layer, x, mix, output.LayerNorm, mlp, block.output.LayerNorm)
    return _bert_outputs(model, body, x, stream), stream


def _bert_outputs(model: Any, body: Any, x: Tensor, stream: Stream) -> list[Tensor]:
    pooler = getattr(body, "pooler", None)
    pooled = [] if pooler is None else [tanh(pooler.dense(x[:, 0]))]
    if model is body:
        return [stream.restore(x), *pooled]
    if hasattr(model, "cls"):
        return [stream.restore(model.cls(x))]
    if pooled:
        return [model.classifier(pooled[0])]
    if hasattr(model.classifier, "out_proj"):
        return [model.classifier.out_proj(tanh(model.classifier.dense(x[:, 0])))]
    return [stream.restore(model.classifier(x))]


def distilbert(
    model: Any, family: Any, methods: Any, input_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[list[Tensor], Stream]:
    """-> [last_hidden_state]."""
    blocks = model.transformer.layer
    stream = started(model, family, methods, len(blocks), attention_mask)
    x = model.embeddings(input_ids)
    for layer, block in enumerate(blocks):
        attention, ffn = block.attention, block.ffn

        def mix(x: Tensor, attention: Any = attention) -> Tensor:
            size = attention.attention_head_size
            return attention.out_lin(attend(stream, x, attention.q_lin, attention.k_lin, attention.v_lin, size))

        def mlp(x: Tensor, ffn: Any = ffn) -> Tensor:
            return ffn.lin2(ffn.activation(ffn.lin1(x)))

        x = post_norm_block(stream, layer, x, mix, block.sa_layer_norm, mlp, block.output_layer_norm)
    return [stream.restore(x)], stream


def albert(
    model: Any, family: Any, methods: Any, input_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[list[Tensor], Stream]:
    """-> [last_hidden_state, pooler_output]; one block's weights serve every layer."""
    layers = model.config.num_hidden_layers
    block = model.encoder.albert_layer_groups[0].albert_layers[0]
    attention, size = block.attention, block.attention.attention_head_size
    stream = started(model, family, methods, layers, attention_mask)

    def mix(x: Tensor) -> Tensor:
        return attention.dense(attend(stream, x, attention.query, attention.key, attention.value, size))

    def mlp(x: Tensor) -> Tensor:
        return block.ffn_output(block.activation(block.ffn(x)))

    x = model.encoder.embedding_hidden_mapping_in(model.embeddings(input_ids))
    for layer in range(layers):
        x = post_norm_block(stream, layer, x, mix, attention.LayerNorm, mlp, block.full_layer_layer_norm)
    return [stream.restore(x), tanh(model.pooler(x[:, 0]))], stream


def mpnet(
    model: Any, family: Any, methods: Any, input_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[list[Tensor], Stream]:
    """-> [last_hidden_state, pooler_output]; all layers share a bias by the distance of two tokens."""
    blocks = model.encoder.layer
    stream = started(model, family, methods, len(blocks), attention_mask)
    x = model.embeddings(input_ids)
    table = model.encoder.compute_position_bias(x[:1])[0]
    for layer, block in enumerate(blocks):
        attention = block.attention.attn

        def mix(x: Tensor, attention: Any = attention) -> Tensor:
            bias, size = stream.pairs(table, x.shape[0]), attention.attention_head_size
            return attention.o(attend(stream, x, attention.q, attention.k, attention.v, size, bias=bias))

        def mlp(x: Tensor, block: Any = block) -> Tensor:
            return block.output.dense(block.intermediate.intermediate_act_fn(block.intermediate.dense(x)))

        x = post_norm_block(stream, layer, x, mix, block.attention.LayerNorm, mlp, block.output.LayerNorm)
    return [stream.restore(x), tanh(model.pooler.dense(x[:, 0]))], stream
