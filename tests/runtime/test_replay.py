"""The command on recipes: replayed from every place they are kept in, refused for other models, shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command import run

import tamis

pytestmark = pytest.mark.usefixtures("workplace")


def test_recipes_replay(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    code, first, _ = run(capsys, "toy.pt2", "--pass", "scale:by=1.3", "-o", "out/", "--json", "--no_restore")
    assert code == 0
    code, again, err = run(capsys, "--config", "out/recipe.yaml", "-o", "b.pt2", "--json")
    assert code == 0, err
    assert json.loads(again)["recipe"] == json.loads(first)["recipe"]
    code, other, _ = run(capsys, "-c", "out/recipe.yaml", "-o", "c.pt2", "--json", "--pass", "scale")
    assert json.loads(other)["recipe"]["passes"] == ["scale"]
    text = Path("out/recipe.yaml").read_text().replace("abcabc", "ffffff")
    Path("other.yaml").write_text(text)
    code, _, err = run(capsys, "--config", "other.yaml", "-o", "d.pt2")
    assert code == 2
    assert "error: other.yaml: the recipe was made for another model (toy.pt2): the hash of its graph is ffff" in err
    assert not Path("d.pt2").exists()
    code, out, _ = run(capsys, "--config", "other.yaml", "-o", "d.pt2", "--allow-other-model")
    assert (code, "note: other.yaml was made for another model (toy.pt2)" in out) == (0, True)
    code, _, err = run(capsys, "toy.pt2", "--pass", "scale", "--allow-other-model")
    assert (code, "error: --allow-other-model without a recipe." in err) == (2, True)


def test_artifacts_replay_to_the_same_bytes(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    for name in ("a.onnx", "a.pt2"):
        code, _, err = run(capsys, "toy.pt2", "--pass", "scale:by=1.3", "-o", name, "--token-map", "--no-restore", "-q")
        assert code == 0, err
        again = Path("again" + Path(name).suffix)
        code, _, err = run(capsys, "--config", name, "-o", str(again), "-q")
        assert code == 0, err
        assert again.read_bytes() == Path(name).read_bytes()


def test_recipes_are_shown(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    assert run(capsys, "toy.pt2", "--pass", "scale:by=1.3", "-o", "a.pt2", "-q")[0] == 0
    code, out, _ = run(capsys, "--show-recipe", "a.pt2")
    assert (code, yaml.safe_load(out)) == (0, tamis.load("a.pt2").recipe.to_dict())
    code, out, _ = run(capsys, "--show-recipe", "a.pt2", "--json")
    assert (code, json.loads(out)) == (0, tamis.load("a.pt2").recipe.to_dict())
    code, _, err = run(capsys, "--show-recipe", "toy.pt2")
    assert (code, "toy.pt2: not a tamis recipe: this .pt2 file was not made by tamis" in err) == (2, True)


def test_a_recipe_whose_model_has_moved(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    assert run(capsys, "toy.pt2", "--pass", "scale", "-o", "a.pt2", "-q")[0] == 0
    Path("toy.pt2").rename("elsewhere.pt2")
    code, _, err = run(capsys, "--config", "a.pt2", "-o", "b.pt2")
    assert code == 2
    assert "toy.pt2: no such file or directory.\n  hint: a.pt2 names it; say with INPUT where the model is now." in err
    assert run(capsys, "elsewhere.pt2", "--config", "a.pt2", "-o", "b.pt2", "-q")[0] == 0
