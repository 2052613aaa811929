"""Text encoders of the zoo: dynamic length, padding masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from family import Family, plain_text_inputs, quietly, text_inputs
from torch import nn

_SIZES = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "vocab_size": 60}
_LENGTH = {"max_position_embeddings": 128}
_KINDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
CLIP_END = 62


def hf_text(model: str, config: str, **options: Any) -> Callable[[int], nn.Module]:
    """A class of transformers with its config class, narrow."""

    def build(layers: int) -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**{**_SIZES, **_LENGTH, "num_hidden_layers": layers, **options})
        return quietly(lambda: getattr(transformers, model)(made))

    return build


def distilbert(layers: int) -> nn.Module:
    """DistilBertModel: no pooler, no token types."""
    from transformers import DistilBertConfig, DistilBertModel

    sizes = {"dim": 48, "n_heads": 3, "hidden_dim": 96, "vocab_size": 60}
    return quietly(lambda: DistilBertModel(DistilBertConfig(**sizes, **_LENGTH, n_layers=layers)))


def t5_encoder(layers: int) -> nn.Module:
    """T5EncoderModel: relative position bias of any length, RMSNorm, no scale."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 48, "d_kv": 16, "d_ff": 96, "num_heads": 3, "vocab_size": 60}
    return quietly(lambda: T5EncoderModel(T5Config(**sizes, num_layers=layers)))


bert = hf_text("BertModel", "BertConfig")
xlm_roberta = hf_text("XLMRobertaForSequenceClassification", "XLMRobertaConfig", pad_token_id=1)
clip_text = hf_text(
    "CLIPTextModel", "CLIPTextConfig", vocab_size=64, eos_token_id=CLIP_END, bos_token_id=61, pad_token_id=1
)
pad_inputs = partial(text_inputs, pad=1)


def _text(name: str, build: Callable[[int], nn.Module], oracle: str, prefix: int = 1, **options: Any) -> Family:
    options = {"inputs": text_inputs, "padded": True, "without": () if prefix else ("evit",), "layers": 2, **options}
    return Family(name, build, options.pop("inputs"), prefix, 24, dynamic=("batch", "length"), oracle=oracle, **options)


TEXT = (
    _text("bert", bert, "bert", layers=3),
    _text("bert_no_mask", bert, "bert", layers=3, inputs=plain_text_inputs, padded=False),
    _text("bert_classifier", hf_text("BertForSequenceClassification", "BertConfig"), "bert"),
    _text("bert_tagger", hf_text("BertForTokenClassification", "BertConfig"), "bert", 0),
    _text("bert_masked", hf_text("BertForMaskedLM", "BertConfig"), "bert", 0),
    _text("distilbert", distilbert, "distilbert", 0),
    # position ids are counted over the tokens that are not padding
    _text("roberta", hf_text("RobertaModel", "RobertaConfig", pad_token_id=1), "bert", inputs=pad_inputs),
    _text("xlm_roberta", xlm_roberta, "bert", inputs=pad_inputs),
    _text("electra", hf_text("ElectraModel", "ElectraConfig", embedding_size=32), "bert", 0),
    _text("albert", hf_text("AlbertModel", "AlbertConfig", embedding_size=32), "albert"),
    # attention is written out, with a bias by distance
    _text("mpnet", hf_text("MPNetModel", "MPNetConfig"), "mpnet", inputs=pad_inputs),
    _text("t5_encoder", t5_encoder, "t5", 0),
    # layer 0 sees everything, the others 4 tokens to either side
    _text(
        "modernbert",
        hf_text("ModernBertModel", "ModernBertConfig", local_attention=8, **_KINDS),
        "modernbert",
        0,
        layers=3,
    ),
)
CLIP_TEXT = _text("clip_text", clip_text, "clip_text", 0, layers=3, inputs=partial(text_inputs, end=CLIP_END))
