"""Decoders captured as their prefill: the same logits and cache as the model's own, whatever the padding."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from decoders import DECODERS, captured, positions, prompt
from torch import Tensor, nn
from zoo import FAMILIES

from tamis.capture import capture
from tamis.capture.decoder import as_prefill, is_decoder

NAMES = list(DECODERS)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def own_answer(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Any:
    """What the model itself answers, told by hand where its tokens stand."""
    with torch.no_grad():
        return model(**inputs, position_ids=positions(inputs["attention_mask"]), **more)


def real(values: Tensor, mask: Tensor) -> Tensor:
    """Rows of real tokens of [B, N, C] or [B, H, N, D]."""
    return (values if values.dim() == 3 else values.transpose(1, 2))[mask.bool()]


@pytest.mark.parametrize("padding", ["left", "right", "mixed"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_cache_equal_the_models_own(name: str, batch: int, padding: str) -> None:
    model, graph = captured(name)
    run = graph.program.module()
    for length in (1, 7, 33):
        inputs = prompt(batch, length, padding, seed=length)
        mask = inputs["attention_mask"]
        got, own = run(**inputs), own_answer(model, inputs)
        torch.testing.assert_close(real(got.logits, mask), real(own.logits, mask), **CLOSE)
        assert len(got.past_key_values) == len(own.past_key_values.layers)
        for (keys, values), layer in zip(got.past_key_values, own.past_key_values.layers, strict=True):
            kept = layer.keys.shape[2]  # a layer with a window forgets the rest itself
            assert keys.shape[:3] == (batch, DECODERS[name].kv_heads, length)
            torch.testing.assert_close(real(keys[:, :, -kept:], mask[:, -kept:]), real(layer.keys, mask[:, -kept:]))
            torch.testing.assert_close(real(values[:, :, -kept:], mask[:, -kept:]), real(layer.values, mask[:, -kept:]))


@pytest.mark.parametrize("name", NAMES)
def test_decoding_goes_on_from_the_returned_cache(name: str) -> None:
    from transformers import DynamicCache

    model, graph = captured(name)
    for padding, length in (("left", 9), ("right", 9), ("left", 3)):
        inputs = prompt(3, length, padding)
        mask = inputs["attention_mask"]
        cache = DynamicCache(graph.program.module()(**inputs).past_key_values, config=model.config)
        own = own_answer(model, inputs).past_key_values
        for step in range(2):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
            token = torch.full((3, 1), 11 + step)
            given = {"input_ids": token, "attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
            with torch.no_grad():
                got, expected = (model(**given, past_key_values=past).logits for past in (cache, own))
            torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_sites_know_heads_scale_cap_window(name: str) -> None:
    decoder, graph = DECODERS[name], captured(name)[1]
    assert len(graph.sites) == len(graph.layers) == len(decoder.windows)
    for site, before in zip(graph.sites, decoder.windows, strict=True):
        assert (site.heads, site.kv_heads, site.role) == (4, decoder.kv_heads, "stream")
        assert site.scale == pytest.approx(decoder.scale)
        assert site.softcap == decoder.softcap
        assert site.hides_later
        assert site.mask.padded
        assert (site.mask.kind, site.mask.window) == (("causal", None) if before is None else ("window", (before, 0)))
        assert bool(site.k_rotation) == bool(site.q_rotation) == decoder.rotary
        assert graph.node(site.k).meta["val"].shape[1] == decoder.kv_heads


def test_left_padding_moves_no_token() -> None:
    """Learned positions show it: without position ids the model itself would answer otherwise."""
    model, graph = captured("gpt2")
    inputs = prompt(2, 9, "left")
    row = {key: value[1:, 3:] for key, value in inputs.items()}
    got = graph.program.module()(**inputs).logits[1:, 3:]
    with torch.no_grad():
        torch.testing.assert_close(got, model(**row).logits, **CLOSE)
        assert not torch.allclose(model(**inputs).logits[1:, 3:], got, atol=1e-2)


def test_positions_given_are_kept() -> None:
    model, _ = captured("gpt2")
    inputs = {**prompt(2, 12, "left"), "position_ids": torch.arange(12).expand(2, 12) + 3}
    graph = capture(model, kwargs=inputs)
    got = graph.program.module()(**inputs).logits
    with torch.no_grad():
        expected = model(**inputs).logits
    mask = inputs["attention_mask"]
    torch.testing.assert_close(real(got, mask), real(expected, mask), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_without_a_mask(name: str) -> None:
    model, _ = captured(name)
    graph = capture(model, (prompt(1, 12, None)["input_ids"],))
    ids = prompt(3, 17, None)["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(graph.program.module()(ids).logits, expected, **CLOSE)
    for site, before in zip(graph.sites, DECODERS[name].windows, strict=True):
        assert site.hides_later
        assert not site.mask.padded
        if before is None:
            assert (site.causal, site.mask.node) == (True, None), "a flag says it, no table of N x N"
        else:
            assert site.mask.window == (before, 0)


def test_last_token_only() -> None:
    model, _ = captured("llama")
    graph = capture(model, kwargs={**prompt(2, 12, "left"), "logits_to_keep": 1})
    inputs = prompt(3, 7, "left")
    got = graph.program.module()(**inputs, logits_to_keep=1)
    assert got.logits.shape == (3, 1, 60)
    torch.testing.assert_close(got.logits, own_answer(model, inputs).logits[:, -1:], **CLOSE)
    assert got.past_key_values[1][0].shape[2] == 7


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_attention_written_out_is_captured_alike(name: str) -> None:
    model, graph = captured(name, "eager")
    sites = captured(name)[1].sites
    for ours, usual in zip(graph.sites, sites, strict=True):
        assert (ours.heads, ours.kv_heads, ours.hides_later) == (usual.heads, usual.kv_heads, usual.hides_later)
        assert (ours.mask.kind, ours.mask.window) == (usual.mask.kind, usual.mask.window)
        assert ours.scale == pytest.approx(usual.scale)
    inputs = prompt(3, 7, "left")
    mask = inputs["attention_mask"]
    got = graph.program.module()(**inputs).logits
    torch.testing.assert_close(real(got, mask), real(own_answer(model, inputs).logits, mask), **CLOSE)


def test_weights_and_paths_are_the_models_and_the_model_stays() -> None:
    model = DECODERS["llama"].model()
    before = set(model.__dict__)
    graph = capture(model, kwargs=prompt(1, 4, None))
    assert set(model.__dict__) == before
    assert model.config.use_cache
    keys = set(graph.program.state_dict)
    assert keys == set(model.state_dict())
    assert graph.sites[1].module == "model.layers.1.self_attn"
    assert graph.name == "LlamaForCausalLM"


def test_a_bare_model_and_a_tuple_have_their_cache_too() -> None:
    model = DECODERS["llama"].model()
    inputs = prompt(2, 6, "right")
    bare = capture(model.model, kwargs=inputs).program.module()(**inputs)
    assert [tuple(pair[0].shape) for pair in bare.past_key_values] == [(2, 2, 6, 12)] * 2
    logits, pairs = as_prefill(model)(**inputs, return_dict=False)
    torch.testing.assert_close(pairs[1][1], bare.past_key_values[1][1])
    assert logits.shape == (2, 6, 60)


def test_only_decoders_that_cache_are_wrapped() -> None:
    model = DECODERS["llama"].model()
    assert is_decoder(model)
    assert as_prefill(model) is not model
    without = copy.deepcopy(model)
    without.config.use_cache = False
    for other in (without, FAMILIES["bert"].shared(), FAMILIES["vit_mean"].shared()):
        assert as_prefill(other) is other


def test_a_cache_of_other_state_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = DECODERS["llama"].model()
    model.config.layer_types = ["linear_attention", "full_attention"]
    with caplog.at_level(logging.WARNING, logger="tamis"):
        assert as_prefill(model, "mine") is model
    assert "mine: its cache holds more than keys and values" in caplog.text
