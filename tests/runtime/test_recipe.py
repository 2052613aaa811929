"""Recipes: round trips and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tamis.errors import ModelNotFound, RecipeInvalid, WrongSourceModel
from tamis.runtime.recipe import Recipe

RECIPE = Recipe(("tome:r=13", "evit:keep_ratio=0.7"), "timm:vit", {"restore": False}, {"tamis": "0.1"}, "f" * 64)


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
    RECIPE.check_source("f" * 64, "r.yaml")
    Recipe(("tome",)).check_source("anything", "r.yaml")
    with pytest.raises(
        WrongSourceModel, match=r"r\.yaml: the recipe was made for a model with hash ffffffffffff, this"
    ):
        RECIPE.check_source("e" * 64, "r.yaml")
