"""Recipes: round trips and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml
from onnx import helper
from toys import toy_graph
from zoo import FAMILIES

import tamis
from tamis.capture.identity import structure_hash, weights_hash
from tamis.errors import ModelNotFound, OutputExists
from tamis.recipe_errors import RecipeInvalid, WrongSourceModel
from tamis.runtime.compiled import CompiledModel
from tamis.runtime.recipe import Recipe

RECIPE = Recipe(
    passes=("tome:r=13", "evit:keep_ratio=0.7"),
    model="timm:vit",
    options={"restore": False},
    plugins={"largest": "largest-methods 0.3"},
    versions={"tamis": "0.0.1"},
    source_hash="f" * 64,
)


def test_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.to_yaml())
    assert Recipe.read(path) == RECIPE
    path.write_text(RECIPE.to_json())
    assert Recipe.read(path) == RECIPE
    assert Recipe.from_dict(json.loads(RECIPE.to_json()), "x") == RECIPE


def test_passes_may_be_mappings() -> None:
    data = yaml.safe_load("passes:\n  - tome: {r: 13}\n  - evit:\n  - random:r=2\n")
    assert Recipe.from_dict(data, "x").passes == ("tome:r=13", "evit", "random:r=2")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "it holds nothing, not a mapping"),
        ([], "it holds a list, not a mapping"),
        ({}, "'passes' is missing or not a list"),
        ({"passes": []}, "'passes' is missing or not a list"),
        ({"passes": [3]}, "a pass is 3, not text such as tome:r=13"),
        ({"pases": ["tome"]}, "unknown key 'pases' (did you mean 'passes'?)"),
        ({"passes": ["tome"], "options": {"restroe": True}}, "unknown option 'restroe' (did you mean 'restore'?)"),
        ({"passes": ["tome"], "options": []}, ""),
        ({"passes": ["tome"], "options": [1]}, "'options' is a list, not a mapping"),
    ],
)
def test_what_is_no_recipe(data: Any, reason: str) -> None:
    if not reason:
        assert Recipe.from_dict(data, "r.yaml").options == {}
        return
    with pytest.raises(RecipeInvalid) as caught:
        Recipe.from_dict(data, "r.yaml")
    assert str(caught.value).startswith(f"r.yaml: not a tamis recipe: {reason}.")


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"none\.yaml: no such file"):
        Recipe.read(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("passes: [")
    with pytest.raises(RecipeInvalid, match=r"bad\.yaml: not a tamis recipe: while parsing"):
        Recipe.read(tmp_path / "bad.yaml")


def test_source() -> None:
    graph = toy_graph()
    same = replace(RECIPE, source_hash=graph.source_hash, weights_hash=weights_hash(graph.program))
    same.check_source(graph, "r.yaml")
    RECIPE.for_any_model().check_source(graph, "r.yaml")
    with pytest.raises(WrongSourceModel) as caught:
        RECIPE.check_source(graph, "r.yaml")
    assert str(caught.value).splitlines()[0] == (
        "r.yaml: the recipe was made for another model (timm:vit): the hash of its graph is ffffffffffff, that of toy "
        "is abcabcabcabc; it was made with tamis 0.0.1, which may be why."
    )
    with pytest.raises(WrongSourceModel, match="the hash of its weights is 000000000000, that of toy is"):
        replace(same, weights_hash="0" * 64).check_source(graph, "r.yaml")


def test_hashes_see_weights_and_constants() -> None:
    """Another scale is another constant in the graph, other weights are other bytes."""
    one, same, scaled = toy_graph().program, toy_graph().program, toy_graph(1.5).program
    assert structure_hash(one) == structure_hash(same) != structure_hash(scaled)
    assert weights_hash(one) == weights_hash(same) == weights_hash(scaled)
    with torch.no_grad():
        next(iter(same.state_dict.values()))[0, 0] += 1
    assert structure_hash(one) == structure_hash(same)
    assert weights_hash(one) != weights_hash(same)


def test_it_comes_out_of_every_artifact(compiled: CompiledModel, tmp_path: Path) -> None:
    compiled.save(tmp_path / "x.pt2")
    compiled.export(tmp_path / "x.onnx", check=False)
    (tmp_path / "out").mkdir()
    compiled.recipe.write(tmp_path / "out" / "recipe.yaml")
    for name in ("x.pt2", "x.onnx", "out"):
        assert Recipe.read(tmp_path / name) == compiled.recipe
    with pytest.raises(OutputExists, match=r"overwrite=True \(--overwrite\) replaces it"):
        compiled.recipe.write(tmp_path / "out" / "recipe.yaml")


def test_artifacts_of_others_hold_none(tmp_path: Path) -> None:
    torch.export.save(toy_graph().program, tmp_path / "x.pt2")
    onnx.save(helper.make_model(helper.make_graph([], "empty", [], [])), tmp_path / "x.onnx")
    (tmp_path / "cut.onnx").write_bytes(b"\xff\xff")
    for name, reason in (
        ("x.pt2", "was not made by tamis"),
        ("x.onnx", "was not made"),
        ("cut.onnx", "cannot be read"),
    ):
        with pytest.raises(RecipeInvalid, match=reason):
            Recipe.read(tmp_path / name)


def test_python_replays() -> None:
    """Passes and options come from the recipe; what is given wins; the model must be the one."""
    family = FAMILIES["vit_mean"]
    args, _ = family.inputs(2)
    model = family.model(layers=2)
    first = tamis.compile(model, args[0], passes="tome:r=3", restore=False, verify=False)
    again = tamis.compile(model, args, recipe=first.recipe, verify=False)
    assert again.recipe == first.recipe
    assert again.graph.diff(first.graph) == ""
    other = tamis.compile(model, args, recipe=first.recipe, passes="random:r=2", verify=False)
    assert (other.recipe.passes, other.recipe.options) == (("random:r=2",), {"restore": False})
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(WrongSourceModel, match="the hash of its weights"):
        tamis.compile(model, args, recipe=first.recipe)
    assert tamis.compile(model, args, recipe=first.recipe.for_any_model(), verify=False).report.changed
