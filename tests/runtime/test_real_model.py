"""The command on a real transformer, with the real capture and the real rewriter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from zoo import FAMILIES

import tamis
from tamis.runtime import cli

FACTORY = """\
from zoo import FAMILIES

def make():
    args, kwargs = FAMILIES[{name!r}].inputs(1)
    return FAMILIES[{name!r}].model(layers=2), args, kwargs
"""


def test_the_whole_way(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FACTORY.format(name="vit_mean"))
    assert cli.main(["net.py:make", "--pass", "tome:r=3", "-o", "out/", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    tokens = FAMILIES["vit_mean"].tokens
    rows = [(row["tokens_in"], row["tokens_out"], row["measured"]) for row in report["layers"]]
    assert rows == [(tokens, tokens - 3, tokens), (tokens - 3, tokens - 6, tokens - 3)]
    assert 0 < report["drift"]["relative_l2"] < 1
    assert report["flops_before"] > report["flops_after"] > 0
    last = report["layers"][-1]
    assert last["flops_before"] > last["flops_after"] > 0
    assert cli.main(["--config", "out/recipe.yaml", "-o", "again.pt2", "-q"]) == 0
    args, _ = FAMILIES["vit_mean"].inputs(3)
    fast = tamis.compile(FAMILIES["vit_mean"].model(layers=2), args, passes="tome:r=3")
    torch.testing.assert_close(tamis.load("again.pt2")(*args), fast(*args))


def test_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FACTORY.format(name="bert"))
    assert cli.main(["net.py:make", "--check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [site["role"] for site in found["sites"]] == ["stream", "stream"]
    passes = {one["name"]: one for one in found["passes"]}
    assert passes["tome"]["layers"] == "0, 1"
    assert passes["scale"]["reason"].startswith("it failed: RuntimeError: ")  # a toy pass is lost on a real model


def test_token_map() -> None:
    family = FAMILIES["vit_mean"]
    args, kwargs = family.inputs(2)
    fast = tamis.compile(family.model(layers=2), args, kwargs=kwargs, passes="tome:r=3", token_map=True)
    outputs, token_map = fast(*args, **kwargs)
    assert token_map.shape == (2, family.tokens)
    assert outputs.shape == family.shared()(*args, **kwargs).shape
    assert fast.report.drift is not None
    assert fast.report.drift.outputs
