"""Sparse attention on a real model: how methods get a density, how they run, and that the page holds the results."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import smollm2
import smollm2_findings
import smollm2_page
import torch
from long_prompts.budgets import CONTROL, KNOBS, at_density, knob_of, methods, settled, tile
from long_prompts.entries import entries, said
from long_prompts.spliced import Spliced
from long_prompts.watch import Watched, looked_at
from sparse_oracle import drawn, expanded, recall
from torch import nn
from zoo import draw

from tamis.capture import capture
from tamis.graph import TokenGraph
from tamis.passes.methods.a_shape import AShape
from tamis.passes.methods.block_sparse import BlockSparse
from tamis.passes.methods.infllm import InfLLM
from tamis.passes.methods.lm_infinite import LMInfinite
from tamis.passes.sparse_recall import LayerHeads
from tamis.passes.sparse_rewrite import Part
from tamis.rewrite import Pipeline
from tamis.runtime.inputs import graph_inputs

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


EACH = (AShape(sink=4, local=20, heads={0: [0, 1], 2: [3]}), BlockSparse(density=0.3, block=8, heads={0: [2], 1: [1]}))


@torch.no_grad()
@pytest.mark.parametrize(
    "passes", [(BlockSparse(density=0.3, block=8),), (LMInfinite(sink=4, local=24),), EACH], ids=str
)
def test_passes_spliced_in_compute_what_the_rewritten_graph_computes(passes: Any) -> None:
    model, graph = decoder()
    prompt = ids(75)
    watched = Watched(passes)
    hidden, filled = Spliced(graph, watched.placed(graph))(prompt)
    rewritten = Pipeline(passes).run(graph).graph.program.module()(input_ids=prompt)
    torch.testing.assert_close(hidden, rewritten.last_hidden_state, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(filled[2], tuple(rewritten.past_key_values[2]), rtol=1e-5, atol=1e-6)
    dense = model(prompt)
    torch.testing.assert_close(Spliced(graph, {})(prompt)[0], dense.last_hidden_state, rtol=1e-5, atol=1e-6)
    assert (hidden - dense.last_hidden_state).norm() > 0.01 * hidden.norm()
    some = {(layer, head) for one in passes for layer, of in (one.heads or {}).items() for head in of}
    for layer, heads in enumerate(watched.of_heads("density")):
        for head, density in enumerate(heads):
            assert 0.2 < density < 0.7 if (layer, head) in some or not some else density == 1


def test_what_is_read_is_noted_as_the_oracle_has_it() -> None:
    """Two prompts, whose pairs are added."""
    method, watched = BlockSparse(density=0.3, block=8), Watched([], heads=[4])
    whole = tuple(range(4))
    pairs, visible, shares = 0.0, 0, []
    for seed, tokens in ((1, 101), (2, 60)):
        heads = drawn(seed, tokens)
        watched.noting(0, Part(method, whole)).method.attend(heads)
        mask, places = expanded(method.index(heads), heads), torch.arange(16, tokens, 17)
        pairs, visible = pairs + mask[:, :, places].sum().item(), visible + 8 * (places + 1).sum().item()
        shares.append(recall(heads, mask)[:, :, places])
    found = watched.reading(recall=True)
    assert found["density"] == round(pairs / visible, 4)
    each = torch.cat([one.transpose(0, 1).flatten(1) for one in shares], 1).mean(1)
    assert found["recall"] == [pytest.approx(each.mean().item(), abs=1e-4)]
    assert found["lowest"] == [pytest.approx(each.min().item(), abs=1e-4)]


@pytest.mark.parametrize("name", sorted({*KNOBS, CONTROL, "block-sparse"}))
def test_every_knob_reaches_a_density(name: str) -> None:
    """To within what a tile or a choice in steps allows; bigbird's own tiles are more than a tenth."""
    cls, heads = next(cls for cls in methods() if cls.name == name), drawn(2, 512, batch=1)
    for target in (0.5, 0.25):
        method = at_density(cls, target, [heads])  # type: ignore[arg-type]
        assert fmean(looked_at(method, heads).density) == pytest.approx(target, abs=0.03), method


def test_a_threshold_is_turned_once_more_where_a_run_reads_otherwise() -> None:
    heads = [drawn(2, 512, batch=1)]
    cls = next(cls for cls in methods() if cls.name == "x-attention")
    first = at_density(cls, 0.2, heads)
    assert settled(cls, 0.2, heads, lambda method: 0.21) == first
    assert settled(cls, 0.2, heads, lambda method: 0.4) == at_density(cls, 0.1, heads) != first
    assert settled(BlockSparse, 0.2, heads, lambda method: 0.4) == at_density(BlockSparse, 0.2, heads)


def test_samples_can_be_asked_for_other_positions_after_the_run() -> None:
    """InfLLM reads far keys at other positions, by tensors that a run lets go of."""
    _, graph = decoder()
    method = InfLLM(sink=2, local=8, blocks=1, block=4, chunk=8, stand_ins=2)
    inputs = graph_inputs(graph.program, ((), {"input_ids": ids(75)}))
    then = [method.index(heads).tiles for _, heads in LayerHeads(graph, range(3))(inputs)]
    after = [heads for _, heads in LayerHeads(graph, range(3), lasting=True)(inputs)]
    for tiles, heads in zip(then, after, strict=True):
        assert torch.equal(tiles, method.index(heads).tiles)
    gone = [heads for _, heads in LayerHeads(graph, range(3))(inputs)]
    with pytest.raises(KeyError):
        method.index(gone[0])


def test_a_method_without_an_index_has_no_knob() -> None:
    class Other(BlockSparse):
        indexed = False

    assert knob_of(BlockSparse) is not None
    assert knob_of(Other) is None


def test_entries_are_methods_shared_choices_and_searches() -> None:
    found = entries()
    assert {"a-shape", "infllm", "minference", CONTROL} <= found.keys()
    assert not {"combiner", "routing", "a-shape:share=kv", f"{CONTROL}:share=kv"} & found.keys()
    assert {"pbs:share=kv", "pbs:share=layer", "infllm:share=query"} <= found.keys()
    assert not {"pbs:share=query", "infllm:share=layer"} & found.keys(), "is the method's own"
    heads = drawn(2, 512, batch=1)
    shared = at_density(BlockSparse, 0.25, [heads], share="layer")
    assert shared.share == "layer"
    assert at_density(BlockSparse, 0.25, [heads]).share == "query"


def test_choices_shared_otherwise_are_measured_at_one_length() -> None:
    asked = list(smollm2.jobs(["pbs", "pbs:share=kv"], [0.25]))
    assert {length for length, _, name, _ in asked if name == "pbs:share=kv"} == {1024}
    assert {length for length, _, name, _ in asked if name == "pbs"} == set(smollm2.LENGTHS)
    assert {(name, density) for _, _, name, density in asked if name == "dense"} == {("dense", 1.0)}


def test_a_cell_says_its_pass_or_how_many_heads_have_each() -> None:
    assert said("block-sparse", [BlockSparse(block=8)]) == {"pass": "block-sparse:block=8"}
    assert said("minference", [*EACH, AShape(heads={1: [0]})]) == {
        "pass": "minference: a-shape at 4 heads, block-sparse at 2 heads",
        "patterns": {"a-shape:sink=4,local=20": 3, "block-sparse:density=0.3,block=8": 2, "a-shape": 1},
    }


def test_tiles_are_a_64th_of_the_prompt() -> None:
    assert [tile(tokens) for tokens in (100, 512, 1000, 1025, 4096)] == [8, 8, 16, 16, 64]


def text(perplexity: float, **more: Any) -> dict[str, Any]:
    lost = [math.log(perplexity) + wave for wave in (0.01, -0.01)]
    return {"pass": "some:density=1", "nll": lost, "density": 0.251, "sha256": "abcdef", "run": RUN, **more}


def key_cell(*exact: bool) -> dict[str, Any]:
    return {
        "keys": [{"depth": 0.1 + 0.2 * i, "exact": one, "nll": 0.25, "tokens": 512} for i, one in enumerate(exact)],
        "density": 0.1,
    }


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


def test_recall_has_a_line_for_each_layer_at_one_density_and_one_for_all_at_each() -> None:
    cells = {"hip/0.25/1024/manual": text(3.0, recall=[0.5, 0.7], lowest=[0.25, 0.125])}
    lines = smollm2_page.recall(cells).splitlines()
    assert lines == ["| layer | `hip` |", "|---|---|", "| 0 | 0.50 / 0.25 |", "| 1 | 0.70 / 0.12 |"]
    assert smollm2_page.recall({}) == "not measured"
    head, _, row, control = smollm2_page.recalls(cells).splitlines()
    assert row.split("|")[head.split("|").index(" 1024 at 0.25 ")] == " 0.60 / 0.12 "
    assert row.count("not measured") == control.count("not measured") - 1 == len(head.split("|")) - 4


def test_shared_choices_stand_under_the_methods_own() -> None:
    more = {"recall": [0.5, 0.7], "lowest": [0.25, 0.125]}
    cells = {
        f"{name}/0.25/1024/{what}": text(value, **more)
        for name, value in (("pbs", 9.0), ("pbs:share=kv", 10.0), ("a-shape", 8.0))
        for what in smollm2.TEXTS
    }
    assert smollm2_page.shares(cells).splitlines()[2:] == [
        "| `pbs` | its own | not measured | 9.00 (reads 25.1%), 0.60 / 0.12 | not measured |",
        "| `pbs` | kv | not measured | 10.00 (reads 25.1%), 0.60 / 0.12 | not measured |",
    ]
    assert smollm2_page.shares({}) == "not measured"
    assert "share=kv" not in smollm2_page.perplexity(cells, 1024) + smollm2_page.keys(cells)


def test_findings_say_who_is_near_dense_attention_and_who_behind_what() -> None:
    values = {"hip": 10.4, "pbs": 13.0, "sparge": 12.9, "tri-shape": 14.0, "streaming-llm": 12.0, "flex-prefill": 31.0}
    values |= {"random-tiles": 30.0}
    cells = {f"{name}/0.1/1024/{what}": text(value) for name, value in values.items() for what in smollm2.TEXTS}
    assert smollm2_findings.perplexities(cells).count("\n") == 1, "nothing without dense attention"
    cells |= {f"dense/1/1024/{what}": text(10.0) for what in smollm2.TEXTS}
    cells |= {"hip/0.25/1024/manual": text(10.0), "random-tiles/0.25/1024/manual": text(10.0)}
    assert smollm2_findings.perplexities(cells).splitlines()[2:] == [
        "| 1024 | 0.1 | `hip` +4.0% | `streaming-llm` +20.0%, `sparge` +29.0%, `pbs` +30.0% | +20.0% | +200.0% "
        "| `flex-prefill`, `pbs`, `sparge` | `flex-prefill` |"
    ]


def test_findings_say_which_keys_are_lost() -> None:
    cells = {"dense/1/512/needle": key_cell(True, False, True), "dense/1/2048/needle": key_cell(False)}
    cells |= {"hip/0.1/512/needle": key_cell(True, True, True), "pbs/0.1/512/needle": key_cell(True, False, False)}
    cells |= {"a-shape/0.1/512/needle": key_cell(False, True, False), "hip/0.1/2048/needle": key_cell(True)}
    assert smollm2_findings.keys(cells).splitlines()[2:] == [
        "| 512 | 0.1 | `hip` | `a-shape` | of 2, 10%: 2, 30%: 1, 50%: 1 |"
    ]


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
        assert cell.get("pass", name).startswith(name.split("/")[0].partition(":")[0]), name
