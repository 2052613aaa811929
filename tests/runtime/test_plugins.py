"""Passes from outside the package: a file that is named, an installed distribution, and what goes wrong with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command import run
from zoo import FAMILIES

import tamis
from tamis import plugins, registry
from tamis.errors import UnknownPass
from tamis.passes import ToMe
from tamis.recipe_errors import NotAPass, PassNameTaken, PluginFailed, PluginMissing
from tamis.registry import find_pass, origin_of, registered_passes
from tamis.rewrite import Pass, Pipeline

METHOD = '''\
from dataclasses import dataclass

import tamis
from tamis.passes import TokenReduction, keep_plan


@tamis.register("{name}")
@dataclass(frozen=True)
class Largest(TokenReduction):
    """Keep the tokens whose hidden state is largest."""

    def plan(self, tokens):
        return keep_plan(tokens, tokens.hidden.float().norm(dim=-1))
'''
FACTORY = """\
from zoo import FAMILIES

def make():
    args, kwargs = FAMILIES["vit_mean"].inputs(1)
    return FAMILIES["vit_mean"].model(layers=2), args, kwargs
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty current directory; what is registered or loaded is forgotten afterwards."""
    registered_passes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(plugins, "_problems", dict(plugins._problems))


def install(site: Path, name: str, module: str, text: str, entry: str) -> None:
    """What an installer leaves: a module, and the metadata of a distribution with one entry point."""
    (site / f"{module}.py").write_text(text)
    info = site / f"{name.replace('-', '_')}-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text(f"[tamis.passes]\n{entry}\n")


def listed(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[dict[str, str], str]:
    """Origins by name, and stderr."""
    code, out, err = run(capsys, "--list-passes", "--json", *argv)
    assert code == 0, err
    return {one["name"]: one["origin"] for one in json.loads(out)}, err


def test_an_installed_method_works_by_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(tmp_path, "largest-methods", "largest_a", METHOD.format(name="largest"), "any = largest_a")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert listed(capsys)[0]["largest"] == "largest-methods 0.3"
    assert "largest  (reduction, from largest-methods 0.3)\n    Keep the tokens" in run(capsys, "--list-passes")[1]
    (tmp_path / "net.py").write_text(FACTORY)
    code, out, err = run(capsys, "net.py:make", "--pass", "largest:r=3,layers=[0]", "-o", "x.pt2", "--json")
    assert code == 0, err
    found = json.loads(out)
    tokens = FAMILIES["vit_mean"].tokens
    rows = [(row["tokens_in"], row["tokens_out"]) for row in found["layers"]]
    assert rows == [(tokens, tokens - 3), (tokens - 3, tokens - 3)]
    assert found["recipe"]["plugins"] == {"largest": "largest-methods 0.3"}


def test_an_entry_point_may_be_the_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Undecorated, it is called as the entry point is."""
    text = METHOD.format(name="x").replace('@tamis.register("x")\n', "")
    install(tmp_path, "largest-class", "largest_b", text, "by-class = largest_b:Largest")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert str(Pipeline.parse("by-class:r=2")) == "by-class:r=2"
    assert origin_of(find_pass("by-class")) == "largest-class 0.3"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_package_of_ours", "ModuleNotFoundError: No module named 'no_such_package_of_ours'"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
        (
            METHOD.format(name="tome"),
            "PassNameTaken: a pass called 'tome' is known already (tamis.passes.methods.tome.",
        ),
        ("import tamis\ntamis.register('x')(int)", "NotAPass: x: builtins.int is not a pass"),
    ],
    ids=["import", "exit", "clash", "no pass"],
)
def test_a_broken_one_is_one_line_and_takes_nothing_with_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, reason: str
) -> None:
    install(tmp_path, "broken-methods", "broken_a", text, "some = broken_a")
    install(tmp_path, "sound-methods", "sound_a", METHOD.format(name="sound"), "some = sound_a")
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("broken_a", "sound_a"):  # of the parameters before
        monkeypatch.delitem(sys.modules, module, raising=False)
    origins, err = listed(capsys)
    (line,) = [line for line in err.splitlines() if "broken-methods" in line]
    assert f"plug-in broken-methods 0.3 could not be loaded (broken_a): {reason}" in line
    assert (origins["sound"], origins["tome"], find_pass("tome")) == ("sound-methods 0.3", "tamis", ToMe)
    with pytest.raises(UnknownPass) as caught:
        find_pass("from-the-broken-one")
    assert [note for note in caught.value.__notes__ if reason in note]


def test_a_named_file_works_by_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "largest.py").write_text(METHOD.format(name="largest"))
    (tmp_path / "net.py").write_text(FACTORY)
    ask = ("net.py:make", "--pass", "largest:r=3,layers=[0]", "-q")
    code, _, err = run(capsys, *ask, "-o", "x.pt2")
    assert (code, "error: unknown pass 'largest'" in err) == (2, True), "a file that was not named is not run"
    code, _, err = run(capsys, *ask, "-o", "x.pt2", "--plugin", "largest.py")
    assert code == 0, err
    origin = listed(capsys, "--plugin", "largest.py")[0]["largest"]
    assert origin.startswith("largest.py (sha256 ")
    assert tamis.load("x.pt2").recipe.plugins == {"largest": origin}
    monkeypatch.setattr(registry, "_REGISTRY", {"largest": find_pass("largest")})  # the others have their own tests
    code, out, _ = run(capsys, "net.py:make", "--check", "--json", "--plugin", "largest.py")
    assert [(one["name"], one["layers"]) for one in json.loads(out)["passes"]] == [("largest", "0, 1")]


def test_a_recipe_says_what_is_missing_and_runs_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "largest.py").write_text(METHOD.format(name="largest"))
    (tmp_path / "net.py").write_text(FACTORY)
    assert run(capsys, "net.py:make", "--plugin", "largest.py", "--pass", "largest:r=3", "-o", "x.pt2", "-q")[0] == 0
    del registry._REGISTRY["largest"]
    code, _, err = run(capsys, "--config", "x.pt2", "-o", "y.pt2")
    assert code == 2
    assert "error: x.pt2: the recipe uses the pass 'largest' of largest.py (sha256 " in err
    assert "name its file with --plugin" in err
    (tmp_path / "largest.py").write_text(METHOD.format(name="largest") + "# changed\n")
    code, out, err = run(capsys, "--config", "x.pt2", "-o", "y.pt2", "--plugin", "largest.py")
    assert code == 0, err
    assert "note: x.pt2 was made with largest of largest.py (sha256 " in out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import tamis\n\nnonsense", "NameError: name 'nonsense' is not defined (line 3)"),
        ("def f(:", "SyntaxError: "),
        ("x = 1", "it registers no pass"),
        (METHOD.format(name="evit"), "PassNameTaken: a pass called 'evit' is known already"),
    ],
)
def test_a_named_file_that_fails_is_an_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(PluginFailed):
        plugins.load_plugin("bad.py")
    code, _, err = run(capsys, "--list-passes", "--plugin", "bad.py")
    assert (code, f"error: bad.py: cannot be loaded as a plug-in: {reason}" in err) == (2, True), err


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PluginMissing):
        plugins.load_plugin("none.py")
    for ask in (("--list-passes",), ("net.py:make", "--check")):
        code, _, err = run(capsys, *ask, "--plugin", "none.py")
        assert (code, "error: none.py: no such file.\n  hint: --plugin takes" in err) == (2, True)


def test_registering_in_a_program() -> None:
    """A cell that is run twice replaces its class; another class may not take the name."""

    def define(by: int) -> type[Pass]:
        class Mine(ToMe):
            doc = by

        return Mine

    first, again = define(1), define(2)
    assert tamis.register("mine")(first).name == "mine"
    tamis.register("mine")(again)
    assert find_pass("mine") is again
    assert origin_of(again) == f"module {__name__}"
    with pytest.raises(PassNameTaken, match=r"a pass called 'mine' is known already \(.*Mine, from module"):
        tamis.register("mine")(type("Other", (ToMe,), {}))
    with pytest.raises(NotAPass, match=r"x: builtins\.int is not a pass"):
        tamis.register("x")(int)  # type: ignore[type-var]
