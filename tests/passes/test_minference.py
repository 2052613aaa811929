"""Patterns per head from MInference's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import captured, prompt

import tamis
from tamis.errors import BadParameter
from tamis.passes.methods.minference import MInference, patterns_of
from tamis.recipe_errors import PatternsUnreadable
from tamis.rewrite import Pipeline, parse_passes

FILE = [
    {
        "0": ["vertical_and_slash", 6, 9, 0.95],
        "1": ["stream_llm", 2, 12, 0.8],
        "2": ["vertical_and_slash", 6, 9, 0.9],
    },
    {"3": ["block_sparse", 3, 0, 0.7], "1": ["vertical_and_slash", 3, 4, 0.99]},
]
TEXT = (
    "vertical-slash:heads={0:[0,2]},columns=6,slashes=9 + a-shape:heads={0:[1]},sink=2,local=12"
    " + block-sparse:heads={1:[3]},tiles=3 + vertical-slash:heads={1:[1]},columns=3,slashes=4"
)


def test_a_file_is_one_pass_for_every_pattern(tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps(FILE))
    assert str(Pipeline.parse(f"minference:patterns={path}")) == TEXT
    by_layer = {str(layer): heads for layer, heads in enumerate(FILE)}
    assert str(Pipeline.parse([MInference(patterns=by_layer)])) == TEXT
    passes = parse_passes({"minference": {"patterns": FILE}})
    assert patterns_of(passes, {(0, 0): 0.95, (0, 1): 0.8, (0, 2): 0.9, (1, 3): 0.7, (1, 1): 0.99}) == FILE


def test_heads_of_low_recall_stay_dense() -> None:
    kept = str(Pipeline.parse([MInference(patterns=FILE, least=0.9)]))
    assert (
        kept == "vertical-slash:heads={0:[0,2]},columns=6,slashes=9 + vertical-slash:heads={1:[1]},columns=3,slashes=4"
    )
    with pytest.raises(PatternsUnreadable, match=r"no head has a score of 1.1"):
        MInference(patterns=FILE, least=1.1)


def test_the_recipe_holds_the_patterns_and_makes_the_same_model() -> None:
    model, graph = captured("llama")
    inputs = prompt(1, 70, None)
    fast = tamis.compile(model, kwargs=inputs, passes=MInference(patterns=FILE), verify=False)
    assert " + ".join(fast.recipe.passes) == TEXT
    again = tamis.Recipe.from_dict(fast.recipe.to_dict(), "recipe")
    program = Pipeline.parse(again.passes).run(graph).graph.program.module()
    with torch.no_grad():
        assert torch.equal(program(**inputs).logits, fast(**inputs).logits)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ("nowhere.json", "nowhere.json: .* no such file"),
        (3, "holds no layers, but one int"),
        ([{"0": ["stream_llm", float("inf"), 2]}], "layer 0, head 0: inf is not a whole number of 0 or more"),
        ([{"0": ["stream_llm", 1.5, 2]}], "layer 0, head 0: 1.5 is not a whole number of 0 or more"),
        ([{"0": ["block_sparse", 0, 0]}], "layer 0, head 0: 0 is not a whole number of 1 or more"),
        ([{"0": ["stream_llm", 1, 2, "high"]}], "layer 0, head 0: its score is 'high', no number"),
        ([["stream_llm", 1, 2]], "layer 0 is a list"),
        ([{"0": ["flex_vertical_and_slash", [0.9, 4096], [0.9, 4096], 0.0]}], "layer 0, head 0: .* is none of"),
        ([{"0": ["stream_llm", "many", 2]}], "layer 0, head 0: 'many' is not a whole number"),
        ([{"first": ["stream_llm", 1, 2]}], "layer 0, head first: 'first' is not a whole number"),
        ([{}], "no head has a score"),
    ],
)
def test_what_holds_no_patterns_is_said(patterns: Any, said: str) -> None:
    with pytest.raises(PatternsUnreadable, match=said):
        MInference(patterns=patterns)


def test_patterns_for_another_model_are_refused() -> None:
    _, graph = captured("llama")
    for patterns, said in (
        ([{}, {}, {"0": ["stream_llm", 1, 2]}], "0 and 1"),
        ([{"9": ["stream_llm", 1, 2]}], "0 and 3"),
    ):
        with pytest.raises(BadParameter, match=f"heads must be (for layers )?between {said}"):
            Pipeline.parse([MInference(patterns=patterns)]).run(graph)
    with pytest.raises(BadParameter, match="patterns must be given"):
        MInference()


def test_a_file_for_a_larger_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.write_text(json.dumps([{}, {}, {"0": ["stream_llm", 2, 12, 0.8]}]))
    with pytest.raises(BadParameter) as caught:
        Pipeline.parse(f"minference:patterns={path}").run(captured("llama")[1])
    assert str(caught.value) == (
        f"a-shape of {path}: heads must be for layers between 0 and 1, got 2.\n  hint: the model has 2 layers."
    )
    path.write_text(json.dumps([{"9": ["stream_llm", 2, 12, 0.8]}]))
    with pytest.raises(BadParameter, match=r"a-shape of .*large.json: heads must be between 0 and 3, got 9"):
        Pipeline.parse(f"minference:patterns={path}").run(captured("llama")[1])
