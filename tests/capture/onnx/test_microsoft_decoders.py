"""Decoders in ONNX Runtime's own spelling, whose cache comes in and goes out: prefill, and going on from there."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import microsoft_decoders
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from microsoft_decoders import GROUPS, HEADS, LAYERS, SIZE, WORDS
from torch import Tensor

from tamis.capture import capture
from tamis.lowering.onnx import export_onnx

Feeds = dict[str, np.ndarray[Any, Any]]


@functools.cache
def file(name: str, folder: Path) -> tuple[Path, Any]:
    """The decoder's file and its captured graph."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        onnx.save(getattr(microsoft_decoders, name)(), path)
    return path, capture(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decoders")


def feeds_of(name: str, rows: int, tokens: int, past: int, room: int | None = None, hidden: int = 0) -> Feeds:
    """Inputs; the last row has `hidden` tokens fewer, and caches have room for `room` tokens."""
    generator = np.random.default_rng(tokens)
    mask = np.ones((rows, past + tokens), np.int64)
    mask[-1, past + tokens - hidden :] = 0
    feeds: Feeds = {"input_ids": generator.integers(0, WORDS, (rows, tokens)), "attention_mask": mask}
    kept = past if room is None else room
    if name == "gpt2":
        feeds["position_ids"] = np.tile(np.arange(past, past + tokens), (rows, 1))
        shapes = {f"past_{i}": (2, rows, HEADS, kept, SIZE) for i in range(LAYERS)}
    else:
        names = [f"past_key_values.{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
        shapes = dict.fromkeys(names, (rows, GROUPS, kept, SIZE))
    return feeds | {key: generator.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def run(path: Path, feeds: Feeds) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {one.name: feeds[one.name] for one in session.get_inputs()})


def run_captured(path: Path, graph: Any, feeds: Feeds) -> list[Tensor]:
    names = [one.name for one in onnx.load(path).graph.input]
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(graph.program.module()(*(torch.from_numpy(feeds[n]) for n in names)))


SIZES = [(2, 5, 0), (1, 7, 0), (3, 1, 4), (1, 4, 3)]  # rows, tokens, tokens before


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_captured_decoder_agrees_with_and_without_a_past(name: str, folder: Path) -> None:
    path, graph = file(name, folder)
    for sizes in SIZES:
        feeds = feeds_of(name, *sizes)
        for one, other in zip(run_captured(path, graph, feeds), run(path, feeds), strict=True):
            np.testing.assert_allclose(one.numpy(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_its_layers_are_sites(name: str, folder: Path) -> None:
    _, graph = file(name, folder)
    kinds = [(site.role, site.cached, site.heads, site.kv_heads) for site in graph.sites]
    assert kinds == [("stream", True, HEADS, GROUPS if name == "llama" else HEADS)] * LAYERS


def test_grouped_attention_is_causal(folder: Path) -> None:
    _, graph = file("llama", folder)
    assert [(site.mask.causal, site.mask.padded) for site in graph.sites] == [(True, True)] * LAYERS


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_export_agrees(name: str, folder: Path, tmp_path: Path) -> None:
    path, graph = file(name, folder)
    export_onnx(graph.program, tmp_path / "out.onnx")
    names = [one.name for one in onnx.load(path).graph.input]
    written = [one.name for one in onnx.load(tmp_path / "out.onnx").graph.input]
    for sizes in SIZES:
        feeds = feeds_of(name, *sizes)
        renamed = {new: feeds[old] for old, new in zip(names, written, strict=True)}
        for one, other in zip(run(tmp_path / "out.onnx", renamed), run(path, feeds), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_prompts_of_two_lengths_in_a_cache_with_room(folder: Path) -> None:
    """What lies behind each row's last token ONNX Runtime leaves as it was in memory."""
    path, graph = file("llama", folder)
    feeds = feeds_of("llama", 2, 6, 0, room=9, hidden=2)
    got, want = run_captured(path, graph, feeds), run(path, feeds)
    for row, length in ((0, 6), (1, 4)):
        np.testing.assert_allclose(got[0][row, :length].numpy(), want[0][row, :length], rtol=1e-4, atol=1e-4)
        for one, other in zip(got[1:], want[1:], strict=True):
            assert one.shape == other.shape == (2, GROUPS, 9, SIZE)
            np.testing.assert_allclose(one[row, :, :length].numpy(), other[row, :, :length], rtol=1e-4, atol=1e-4)
