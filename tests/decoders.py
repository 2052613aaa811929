"""The causal language models that tests run on: real architectures, two layers (Gemma 3 three), random weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from zoo import draw, quietly

from tamis.capture import capture
from tamis.graph import TokenGraph

WINDOW = 5  # tokens a local layer sees, itself included


@dataclass(frozen=True)
class Decoder:
    """One architecture.

    config    name of the config class in transformers, and what it is made with
    kv_heads  key-value heads, where there are 4 query heads
    windows   per layer, how many tokens before itself a token sees; None: all
    scale     what the logits are multiplied by
    softcap   bound of the logits; None: there is none
    rotary    whether keys are rotated by position
    """

    name: str
    config: str
    options: dict[str, Any]
    kv_heads: int
    scale: float
    windows: tuple[int | None, ...] = (None, None)
    softcap: float | None = None
    rotary: bool = True

    @property
    def attention(self) -> str:
        """What transformers calls the usual implementation; its `sdpa` has no soft cap."""
        return "eager" if self.softcap else "sdpa"

    def model(self, attention: str | None = None, layers: int | None = None) -> nn.Module:
        """A fresh module in eval mode; the same weights every time."""
        import transformers

        depth = {self.options_name("layers"): layers or len(self.windows)}
        config = getattr(transformers, self.config)(**{**self.options, **depth})
        auto = transformers.AutoModelForCausalLM
        implementation = attention or self.attention
        return draw(quietly(lambda: auto.from_config(config, attn_implementation=implementation))).eval()

    def options_name(self, what: str) -> str:
        """What this config calls the number of layers."""
        return "n_layer" if "n_embd" in self.options else "num_hidden_layers"


@cache
def captured(name: str, attention: str | None = None) -> tuple[nn.Module, TokenGraph]:
    """A decoder and its graph, for all tests; do not change them."""
    model = DECODERS[name].model(attention)
    return model, capture(model, kwargs=prompt(2, 12, "left"))


def prompt(batch: int, length: int, padding: str | None, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids [batch, length] with their mask.

    Row i has 3 * i padding tokens on its side, but at least one real one; "mixed" pads even rows on the left and odd
    ones on the right.  Ids at padding are random too, so that reading them is noticed.
    """
    ids = torch.randint(5, 60, (batch, length), generator=torch.Generator().manual_seed(4000 + seed))
    mask = torch.ones_like(ids)
    for row in range(batch):
        gap = min(3 * row, length - 1) if padding else 0
        side = padding if padding != "mixed" else ("left", "right")[row % 2]
        if gap and side == "left":
            mask[row, :gap] = 0
        elif gap:
            mask[row, -gap:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def positions(mask: Tensor) -> Tensor:
    """Where `generate` says that the tokens of a mask [B, N] stand, spelled out row by row; 0 at padding."""
    rows = []
    for row in mask.tolist():
        seen, places = 0, []
        for real in row:
            places.append(seen if real else 0)
            seen += real
        rows.append(places)
    return torch.tensor(rows)


def given_weights(name: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Attention of every layer [B, H, N, N] as the model itself returns it, 0 for queries that are padding."""
    model = DECODERS[name].model("eager")
    mask = inputs["attention_mask"]
    with torch.no_grad():
        found = model(**inputs, position_ids=positions(mask), output_attentions=True).attentions
    return [one.double() * mask[:, None, :, None] for one in found]


_SIZES = {"hidden_size": 48, "num_attention_heads": 4, "vocab_size": 60, "max_position_embeddings": 128}
_SIZES = {**_SIZES, "intermediate_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_SINGLE = {**_SIZES, "num_key_value_heads": 1}
_WIDE = {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
_GPT2 = {"n_embd": 48, "n_head": 4, "n_positions": 128, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
_OPT = {**{k: v for k, v in _SIZES.items() if k != "intermediate_size"}, "ffn_dim": 64, "word_embed_proj_dim": 48}
_LOCAL = WINDOW - 1
_NARROW_SCALE = 12**-0.5

DECODERS = {
    decoder.name: decoder
    for decoder in (
        Decoder("llama", "LlamaConfig", _GROUPED, 2, _NARROW_SCALE),
        Decoder(
            "smollm2", "LlamaConfig", {**_SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True}, 1, 12**-0.5
        ),
        Decoder("qwen2", "Qwen2Config", _GROUPED, 2, _NARROW_SCALE),
        Decoder("qwen3", "Qwen3Config", {**_GROUPED, "head_dim": 16}, 2, 0.25),
        Decoder("mistral", "MistralConfig", {**_GROUPED, "sliding_window": WINDOW}, 2, _NARROW_SCALE, (_LOCAL, _LOCAL)),
        Decoder("phi3", "Phi3Config", _GROUPED, 2, _NARROW_SCALE),
        Decoder("gemma", "GemmaConfig", {**_SINGLE, "head_dim": 16}, 1, 0.25),
        Decoder("gemma2", "Gemma2Config", {**_WIDE, "attn_logit_softcapping": 4.0}, 2, 0.25, (_LOCAL, None), 4.0),
        Decoder(
            "gemma3",
            "Gemma3TextConfig",
            {**_WIDE, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
            2,
            0.25,
            (_LOCAL, _LOCAL, None),
        ),
        Decoder("gpt2", "GPT2Config", _GPT2, 4, _NARROW_SCALE, rotary=False),
        Decoder("opt", "OPTConfig", _OPT, 4, 1.0, rotary=False),
    )
}
