"""Patterns per head: what is chosen, within which budget, and that recipe and report say so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import captured, given_weights, prompt
from sparse_oracle import drawn

import tamis
from tamis.attention_index import Heads
from tamis.errors import BadParameter, InputMismatch, ModelNotFound, NothingChanged
from tamis.passes.index_pairs import held
from tamis.passes.methods.a_shape import AShape
from tamis.passes.methods.minference import MInference
from tamis.passes.sparse_candidates import candidates
from tamis.recipe_errors import NoPatternFound, TooShortToCalibrate

TOKENS = 192


def planted() -> Heads:
    """Heads that attend to their neighbours, to three keys, to the block that a random code names, and evenly."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(TOKENS).float()
    waves = torch.arange(1, 9) * torch.pi / TOKENS
    near = torch.cat([torch.cos(place[:, None] * waves), torch.sin(place[:, None] * waves)], 1)
    column = torch.zeros(TOKENS, 16)
    column[[0, 17, 60], 0] = 1.0
    asks = torch.zeros(TOKENS, 16)
    asks[:, 0] = 1.0
    codes = torch.nn.functional.normalize(torch.randn(12, 16, generator=generator), dim=-1)
    tiles = codes[torch.arange(TOKENS) // 16]
    wanted = codes[(torch.arange(TOKENS) // 16) * torch.randint(0, 7, (1,), generator=generator) // 11]
    even = torch.zeros(TOKENS, 16)
    queries = torch.stack([near * 6, asks * 30, wanted * 40, even])
    keys = torch.stack([near, column, tiles, even])
    return Heads(queries[None], keys[None], keys[None], None, 1.0, True, None, 0, 2)


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> Heads:
    """Every layer of a model has the planted heads."""
    found = planted()

    class Planted:
        def __init__(self, graph: Any, layers: Any) -> None:
            self.layers = [graph.layers[index] for index in layers]

        def __call__(self, inputs: Any) -> Iterator[Any]:
            return iter([(layer, found) for layer in self.layers])

    monkeypatch.setattr("tamis.runtime.recall.LayerHeads", Planted)
    return found


def test_each_head_gets_the_pattern_that_suits_it(heads: Heads) -> None:
    _, graph = captured("llama")
    found = tamis.calibrate(graph, kwargs=prompt(1, TOKENS, None), budget=0.3)
    names = [one.method.partition(":")[0] for one in found.heads if one.layer == 1]
    assert names == ["a-shape", "vertical-slash", "block-sparse", "dense"]
    assert all(one.recall >= 0.9 and 0 < one.cost <= 0.3 for one in found.heads if one.method != "dense")
    even = found.heads[-1]
    assert (even.recall, even.cost, even.head, even.layer) == (1.0, 1.0, 3, 1)
    assert 0.1 < even.best < 0.9
    assert [one.heads for one in found.passes] == [{0: [head], 1: [head]} for head in range(3)]
    everything = tamis.calibrate(graph, kwargs=prompt(1, TOKENS, None), budget=0.3, least=0.0)
    assert "dense" not in {one.method for one in everything.heads}
    text = str(found)
    assert text.startswith("calibrated on 1 prompt of up to 192 tokens, within 0.3 of dense attention: recall 1.0000")
    assert "2 of 8 heads stay dense" in text
    assert text.splitlines()[2].startswith("layer 1: recall")
    assert text.endswith("dense at heads 3")


def test_default_patterns_cost_about_the_same() -> None:
    for tokens, budget in ((TOKENS, 0.3), (1500, 0.25), (1500, 0.1)):
        one = drawn(1, tokens, batch=1, kv=1, group=1, size=8)
        tried = candidates(tokens, budget)
        read = [each.density[0] for each in held(one, [method.index(one) for method in tried])]
        by_name: dict[str, list[float]] = {}
        for method, density in zip(tried, read, strict=True):
            by_name.setdefault(method.name, []).append(density)
        assert by_name.keys() == {"a-shape", "vertical-slash", "block-sparse"}
        assert all(any(0.6 * budget < density <= 1.01 * budget for density in own) for own in by_name.values()), by_name


@pytest.mark.parametrize(("tokens", "block"), [(192, 16), (1024, 16), (2048, 32), (4096, 64), (32768, 64)])
def test_default_tiles_are_a_64th_of_the_prompt_between_16_and_64(tokens: int, block: int) -> None:
    assert {one.block for one in candidates(tokens, 0.25) if not isinstance(one, AShape)} == {block}


def test_static_patterns_are_chosen_as_the_models_own_weights_say() -> None:
    """Two prompts of different lengths: the recall of each head, summed over all queries that count."""
    _, graph = captured("llama")
    calls = [prompt(1, 40, None, seed=1), prompt(1, 60, None, seed=2)]
    sizes = [(1, 10), (6, 5), (10, 1), (2, 40)]
    patterns = [f"a-shape:sink={sink},local={local}" for sink, local in sizes]
    found = tamis.calibrate(graph, kwargs=calls[0], data=calls, patterns=patterns, budget=0.5, least=0.0)
    mass = torch.zeros(len(sizes), 2, 4, dtype=torch.float64)
    pairs = torch.zeros(len(sizes), dtype=torch.float64)
    queries = seen = 0
    for call in calls:
        place = torch.arange(call["input_ids"].shape[1])
        apart = place.unsqueeze(1) - place
        count = place >= int(0.5 * (len(place) + 1) / 2)
        given = torch.stack([one[0] for one in given_weights("llama", call)])
        queries, seen = queries + int(count.sum()), seen + int((apart >= 0).sum())
        for i, (sink, local) in enumerate(sizes):
            read = (apart >= 0) & ((apart < local) | (place < sink))
            pairs[i] += read.sum()
            mass[i] += (given * read * count.unsqueeze(1)).sum((2, 3))
    allowed = pairs / seen <= 0.5
    assert allowed.tolist() == [True, True, True, False]
    recall = torch.where(allowed[:, None, None], mass / queries, -1.0)
    assert len(recall.argmax(0).unique()) > 1, "not all heads want the same"
    for one in found.heads:
        number = int(recall[:, one.layer, one.head].argmax())
        assert one.method == patterns[number]
        assert one.recall == pytest.approx(recall[number, one.layer, one.head].item(), rel=1e-5)
        assert one.cost == pytest.approx((pairs[number] / seen).item())
    assert (found.prompts, found.tokens) == (2, 60)


def test_groups_that_share_get_one_pattern_and_the_loss_is_said() -> None:
    _, graph = captured("llama")
    patterns = "block-sparse:block=8,density=0.3 + vertical-slash:columns=8,slashes=8,block=8,near=4,sink=4,estimate=16"
    inputs = prompt(1, 64, None)
    found = tamis.calibrate(graph, kwargs=inputs, patterns=patterns, budget=0.9, least=0.0, share="kv")
    for first, second in zip(found.heads[::2], found.heads[1::2], strict=True):
        assert first.method == second.method
        assert "share=kv" in first.method
        assert first.alone is not None
    assert "sharing choices costs" in found.headline()
    alone = tamis.attention_recall(graph, kwargs=inputs, passes=found.passes, after=int(0.9 * 65 / 2))
    assert [x for layer in alone.layers for x in layer.recall] == pytest.approx([one.recall for one in found.heads])
    assert [x for layer in alone.layers for x in layer.alone or ()] == pytest.approx([h.alone for h in found.heads])


def test_patterns_go_to_a_file_and_back(heads: Heads, tmp_path: Path) -> None:
    _, graph = captured("llama")
    found = tamis.calibrate(graph, kwargs=prompt(1, TOKENS, None), budget=0.3)
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps(found.patterns()))
    back = MInference(patterns=str(path)).expanded()
    assert [(one.name, one.heads) for one in back] == [(one.name, one.heads) for one in found.passes[:2]]  # type: ignore[attr-defined]
    assert found.patterns()[1]["0"][0] == "stream_llm"
    assert json.loads(json.dumps(found.to_dict()))["heads"][0]["head"] == 0


def test_the_command_writes_patterns_into_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tamis.runtime.cli import main

    source = tmp_path / "mine.py"
    source.write_text(
        "from decoders import DECODERS, prompt\n\n\ndef llama():\n"
        "    return DECODERS['llama'].model(layers=1), (), prompt(1, 80, None)\n"
    )
    data = tmp_path / "prompts.npz"
    np.savez(data, **{name: x.numpy() for name, x in prompt(2, 96, None, seed=3).items()})
    command = [f"{source}:llama", "--calibrate", str(data), "--budget", "0.4", "--min-recall", "0"]
    command += ["--dense-below", "40"]
    assert main([*command, "-o", str(tmp_path / "a.pt2"), "--report", str(tmp_path / "a.json")]) == 0
    said = capsys.readouterr().out
    assert "calibrated on 2 prompts of up to 96 tokens" in said
    recipe = tamis.Recipe.read(tmp_path / "a.pt2")
    assert all("heads={0:[" in one for one in recipe.passes)
    assert recipe.options == {"dense_below": 40}
    report = json.loads((tmp_path / "a.json").read_text())
    assert len(report["calibration"]["heads"]) == 4
    assert report["calibration"]["passes"] == list(recipe.passes)
    assert main(["--config", str(tmp_path / "a.pt2"), "-o", str(tmp_path / "b.pt2"), "-q"]) == 0
    inputs = prompt(2, 70, "left")
    first, again = (tamis.load(tmp_path / f"{name}.pt2") for name in "ab")
    with torch.no_grad():
        assert torch.equal(first(**inputs).logits, again(**inputs).logits)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"budget": 0}, BadParameter, "budget must be in"),
        ({"least": 1.5}, BadParameter, "least must be between"),
        ({"patterns": "tome:r=2"}, BadParameter, "must be sparse attention"),
        ({"patterns": "a-shape:heads=[0]"}, BadParameter, "heads must be left out"),
        ({"patterns": "combiner"}, NothingChanged, "more than keys"),
        ({"patterns": []}, BadParameter, "patterns must be given"),
        ({"budget": "much"}, BadParameter, "budget must be in"),
        ({"share": "all"}, BadParameter, "share must be one of query, kv, layer, got 'all'"),
        ({"every": 0}, BadParameter, "every must be a whole number, 1 or more, got 0"),
        ({"data": []}, BadParameter, "data must be prompts"),
        ({"data": torch.ones(1, 30)}, BadParameter, "data must be a list of prompts, got a Tensor"),
        ({"data": [{"input_ids": 3}]}, InputMismatch, "batch and length apart, got input_ids is an int, not a tensor"),
        ({"data": "nowhere.npz"}, ModelNotFound, "nowhere.npz: no such file"),
        ({}, TooShortToCalibrate, "longest prompt has 30 tokens"),
        (
            {"patterns": "a-shape:local=2", "budget": 0.5, "least": 1},
            NoPatternFound,
            "no head reads 1 of its attention",
        ),
        (
            {"data": [prompt(1, 80, None) | {"input_ids": torch.full((1, 80), 10**6)}]},
            InputMismatch,
            "index out of range",
        ),
        ({"data": [{"ids": torch.ones(1, 3)}]}, InputMismatch, "no such input"),
    ],
)
def test_what_cannot_be_calibrated_is_said(options: Any, error: type[Exception], said: str) -> None:
    _, graph = captured("llama")
    with pytest.raises(error, match=said):
        tamis.calibrate(graph, kwargs=prompt(1, 30, None), **options)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--budget", "0.1"], "--budget without --calibrate"),
        (["--calibrate", "prompts.npz", "--config", "recipe.yaml"], "--calibrate and --config exclude each other"),
        (["--calibrate", "prompts.npz", "--check"], "--calibrate and --check exclude each other"),
        (["--pass", "a-shape", "--token-map"], "token_map must be left out with sparse attention"),
        (["--calibrate", "nowhere.npz"], "nowhere.npz: no such file"),
        (["--pass", "a-shape", "--dense-below", "soon"], "must be a number of tokens or auto, got soon"),
    ],
)
def test_wrong_usage_is_said(more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tamis.runtime.cli import main

    assert main([__file__ + ":llama", *more, "-q"]) == 2
    assert said in capsys.readouterr().err
