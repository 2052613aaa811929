"""Sparse attention on a real model: how methods get a density, how they run, and that the page holds the results."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import smollm2
import smollm2_page
import torch
from long_prompts.budgets import CONTROL, KNOBS, at_density, knob_of, methods, settled, tile
from long_prompts.spliced import Spliced
from long_prompts.watch import Watched, mean_density, reading
from sparse_oracle import drawn, expanded, recall
from torch import nn
from zoo import draw

from tamis.capture import capture
from tamis.graph import TokenGraph
from tamis.passes.methods.block_sparse import BlockSparse
from tamis.passes.methods.lm_infinite import LMInfinite
from tamis.rewrite import Pipeline

RUN = {"date": "2026-01-01", "commit": "0123456789", "machine": "x86_64", "versions": {"torch": "2.15"}}


@cache
def decoder() -> tuple[nn.Module, TokenGraph]:
    """A small Llama without its head, and its graph."""
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    model = draw(LlamaModel(LlamaConfig(vocab_size=60, intermediate_size=64, **sizes))).eval()
    return model, capture(model, kwargs={"input_ids": ids(12)})


def ids(length: int) -> torch.Tensor:
    return torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
@pytest.mark.parametrize("method", [BlockSparse(density=0.3, block=8), LMInfinite(sink=4, local=24)], ids=str)
def test_a_method_spliced_in_computes_what_the_rewritten_graph_computes(method: Any) -> None:
    model, graph = decoder()
    prompt = ids(75)
    watched = Watched(method)
    hidden, filled = Spliced(graph, watched)(prompt)
    rewritten = Pipeline((method,)).run(graph).graph.program.module()(input_ids=prompt)
    torch.testing.assert_close(hidden, rewritten.last_hidden_state, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(filled[2], tuple(rewritten.past_key_values[2]), rtol=1e-5, atol=1e-6)
    dense = model(prompt)
    torch.testing.assert_close(Spliced(graph, None)(prompt)[0], dense.last_hidden_state, rtol=1e-5, atol=1e-6)
    assert (hidden - dense.last_hidden_state).norm() > 0.01 * hidden.norm()
    assert len(watched.layers) == 3
    assert 0.2 < mean_density(watched.layers) < 0.6


def test_what_is_read_is_noted_as_the_oracle_has_it() -> None:
    heads, watched = drawn(1, 101), Watched(BlockSparse(density=0.3, block=8))
    watched.attend(heads)
    found = reading(watched.layers, recall=True)
    mask, places = expanded(watched.method.index(heads), heads), torch.arange(16, 101, 17)
    assert found["density"] == round((mask[:, :, places].sum() / (8 * (places + 1).sum())).item(), 4)
    each = recall(heads, mask)[:, :, places].mean((0, 2))
    assert found["recall"] == [pytest.approx(each.mean().item(), abs=1e-4)]
    assert found["lowest"] == [pytest.approx(each.min().item(), abs=1e-4)]


@pytest.mark.parametrize("name", sorted({*KNOBS, CONTROL, "block-sparse"}))
def test_every_knob_reaches_a_density(name: str) -> None:
    """To within what a tile or a choice in steps allows; bigbird's own tiles are more than a tenth."""
    cls, heads = next(cls for cls in methods() if cls.name == name), drawn(2, 512, batch=1)
    for target in (0.5, 0.25):
        watched = Watched(at_density(cls, target, [heads]))  # type: ignore[arg-type]
        watched.attend(heads)
        assert mean_density(watched.layers) == pytest.approx(target, abs=0.03), watched.method


def test_a_threshold_is_turned_once_more_where_a_run_reads_otherwise() -> None:
    heads = [drawn(2, 512, batch=1)]
    cls = next(cls for cls in methods() if cls.name == "x-attention")
    first = at_density(cls, 0.2, heads)
    assert settled(cls, 0.2, heads, lambda method: 0.21) == first
    assert settled(cls, 0.2, heads, lambda method: 0.4) == at_density(cls, 0.1, heads) != first
    assert settled(BlockSparse, 0.2, heads, lambda method: 0.4) == at_density(BlockSparse, 0.2, heads)


def test_a_method_without_an_index_has_no_knob() -> None:
    class Other(BlockSparse):
        indexed = False

    assert knob_of(BlockSparse) is not None
    assert knob_of(Other) is None


def test_tiles_are_a_64th_of_the_prompt() -> None:
    assert [tile(tokens) for tokens in (100, 512, 1000, 1025, 4096)] == [8, 8, 16, 16, 64]


def text(perplexity: float, **more: Any) -> dict[str, Any]:
    lost = [math.log(perplexity) + wave for wave in (0.01, -0.01)]
    return {"pass": "some:density=1", "nll": lost, "density": 0.251, "sha256": "abcdef", "run": RUN, **more}


def key_cell(*exact: bool) -> dict[str, Any]:
    return {"keys": [{"depth": 0.1, "exact": one, "nll": 0.25, "tokens": 512} for one in exact], "density": 0.1}


def test_a_row_says_what_was_measured_what_was_not_and_what_loses() -> None:
    cells = {
        "dense/1/1024/manual": text(8.0),
        "dense/1/1024/licence": text(18.0),
        "a-shape/0.5/1024/manual": text(16.0),
        "a-shape/0.25/1024/manual": text(10.0),
        "a-shape/0.25/1024/licence": text(40.0),
        "random-tiles/0.5/1024/manual": text(10.0),
        "random-tiles/0.25/1024/manual": text(20.0),
        "random-tiles/0.25/1024/licence": text(80.0),
        "hip/0.1/1024/manual": {"refused": "why not"},
    }
    lines = smollm2_page.perplexity(cells, 1024).splitlines()
    assert lines == [
        "| method | at 0.5 | at 0.25 | at 0.1 |",
        "|---|---|---|---|",
        "| dense | 12.00 (manual, licence) |  |  |",
        "| `a-shape` | 16.00 (reads 25.1%, manual only); **loses to the control** | 20.00 (reads 25.1%); better "
        "| not measured |",
        "| `hip` | not measured | not measured | refused: why not |",
        "| `random-tiles` | 10.00 (reads 25.1%, manual only) | 40.00 (reads 25.1%) | not measured |",
    ]


def test_a_method_behind_a_static_pattern_is_marked() -> None:
    names = {"hip": 16.0, "pbs": 10.0, "tri-shape": 16.0, "streaming-llm": 12.0, "random-tiles": 20.0}
    cells = {f"{name}/0.1/1024/manual": text(value) for name, value in names.items()}
    marked = [line for line in smollm2_page.perplexity(cells, 1024).splitlines() if "behind `streaming-llm`" in line]
    assert [line.split("|")[1].strip() for line in marked] == ["`hip`"]


def test_keys_are_shown_by_depth() -> None:
    cells = {"dense/1/512/needle": key_cell(True, True), "hip/0.1/1024/needle": key_cell(True, False)}
    lines = smollm2_page.keys(cells).splitlines()
    assert lines[2].startswith("| dense | `xx` 0.25 |  |  | not measured |")
    assert "| `x-` 0.25, 10% |" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_recall_has_a_line_for_each_layer_and_one_for_all() -> None:
    cells = {"hip/0.1/1024/manual": text(3.0, recall=[0.5, 0.7], lowest=[0.25, 0.125])}
    lines = smollm2_page.recall(cells, 0.1).splitlines()
    assert lines == [
        "| layer | `hip` |",
        "|---|---|",
        "| 0 | 0.50 / 0.25 |",
        "| 1 | 0.70 / 0.12 |",
        "| all | 0.60 / 0.12 |",
    ]
    assert smollm2_page.recall(cells, 0.5) == "not measured"


def test_a_cell_is_kept_as_soon_as_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "RESULT", tmp_path / "smollm2.json")
    monkeypatch.setattr(smollm2, "PACKAGES", ("torch",))  # the weights' package need not be here
    for name in ("hip/0.1/512/needle", "a-shape/0.25/1024/manual"):
        smollm2.keep(name, {"density": 0.1})
    found = json.loads((tmp_path / "smollm2.json").read_text())
    assert list(found) == ["a-shape/0.25/1024/manual", "hip/0.1/512/needle"]
    run = found["hip/0.1/512/needle"]["run"]
    assert run["command"].endswith("--methods hip --densities 0.1 --lengths 512 --what needle")
    assert {"commit", "date", "machine"} <= run.keys()


def test_the_page_says_what_was_measured() -> None:
    page, cells = smollm2.PAGE.read_text(), smollm2.cells()
    assert smollm2_page.rendered(page, cells) == page
    assert smollm2_page.rendered(page.replace("generated -->\n", "generated -->\nold\n"), cells) == page
    assert "dense/1/1024/manual" in cells
    for name, cell in cells.items():
        assert name.split("/")[0] in cell.get("pass", name), name
