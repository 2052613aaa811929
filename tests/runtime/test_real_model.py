"""The command on a real transformer, with the real capture and the real rewriter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def test_an_artifact_replays_to_the_same_bytes_in_another_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sets of strings have another order there, and objects other addresses."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FACTORY.format(name="bert"))
    assert cli.main(["net.py:make", "--pass", "tome:keep_ratio=0.8", "-o", "a.pt2", "-q"]) == 0
    replay = "from tamis.runtime.cli import main; raise SystemExit(main(['--config', 'a.pt2', '-o', 'b.pt2', '-q']))"
    seed = str((int(os.environ.get("PYTHONHASHSEED", "0").replace("random", "0")) + 1) % 1000)
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", replay], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path("a.pt2").read_bytes() == Path("b.pt2").read_bytes()
