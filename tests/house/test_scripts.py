"""The shell scripts: they set themselves up once, say what they do, and fail with a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from house.sources import ROOT

FAKE_PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m pip" ]; then echo "$*" >>"{calls}"; echo "pip was here"; exit {status}; fi
exec "{python}" "$@"
"""


def bash(script: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script after sourcing scripts/setup.sh, in an environment without TAMIS_* and VIRTUAL_ENV."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("TAMIS_", "VIRTUAL_ENV"))}
    command = f"set -euo pipefail; source '{ROOT}/scripts/setup.sh'; {script}"
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=300
    )


def fake_venv(tmp_path: Path, status: int = 0) -> Path:
    """A virtual environment whose pip only writes down how it was called."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON.format(calls=tmp_path / "calls", status=status, python=sys.executable))
    python.chmod(0o755)
    return tmp_path / "venv"


def test_pip_runs_once(tmp_path: Path) -> None:
    venv = fake_venv(tmp_path)
    first = bash("tamis_setup test; echo $PYTHON", tmp_path, TAMIS_VENV=str(venv))
    again = bash("tamis_setup test; echo $PYTHON", tmp_path, TAMIS_VENV=str(venv))
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert first.stdout == again.stdout == f"{venv}/bin/python\n"
    assert "installing tamis[test]" in first.stderr
    assert "is up to date" in again.stderr
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.endswith(f"-e {ROOT}[test]")


def test_each_extra_is_installed(tmp_path: Path) -> None:
    venv = fake_venv(tmp_path)
    done = bash("tamis_setup test; tamis_setup demo; tamis_setup test", tmp_path, TAMIS_VENV=str(venv))
    assert done.returncode == 0, done.stderr
    assert [call[-6:] for call in (tmp_path / "calls").read_text().splitlines()] == ["[test]", "[demo]"]


def test_a_failed_install_shows_why_and_is_tried_again(tmp_path: Path) -> None:
    venv = fake_venv(tmp_path, status=1)
    for _ in range(2):
        done = bash("tamis_setup test; echo not reached", tmp_path, TAMIS_VENV=str(venv))
        assert (done.returncode, done.stdout) == (2, "")
        assert "pip was here" in done.stderr
        assert "error: pip could not install tamis[test]" in done.stderr


def test_no_python_is_said(tmp_path: Path) -> None:
    done = bash("tamis_setup test", tmp_path, TAMIS_VENV=str(tmp_path / "new"), TAMIS_PYTHON="no-such-python")
    assert done.returncode == 2
    assert "error: Python 3.11 or newer is needed; found" in done.stderr
    assert not (tmp_path / "new").exists()


def test_an_active_environment_without_tamis_is_left_alone(tmp_path: Path) -> None:
    done = bash("choose_venv", tmp_path, VIRTUAL_ENV=str(tmp_path))
    assert done.stdout.strip() == str(ROOT / ".venv")


@pytest.mark.parametrize(
    "name",
    [
        *("scripts/test", "scripts/demo", "scripts/train_digits_vit", "scripts/train_digits_parts"),
        *("scripts/typecheck", "scripts/gpu_check", ".ci/run"),
    ],
)
def test_scripts_are_executable(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    if name != ".ci/run" and (ROOT / name).read_text().startswith("#!/usr/bin/env bash"):
        assert subprocess.run([ROOT / name, "--help"], capture_output=True, text=True).stdout.strip()


def test_the_record_plugin_counts(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert False\n"
        "@pytest.mark.skip\n"
        "def test_c(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_d(broken): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "record_tests", "--record", tmp_path / "r.json", tmp_path]
    command += ["-m", "not full"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    subprocess.run([*command, "-n", "2"], cwd=tmp_path, env=env, capture_output=True, timeout=300)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["counts"] == {"failed": 2, "passed": 1, "skipped": 1}
    assert result["marked"] == "not full"
    assert sorted(name.split("::")[1] for name in result["failed"]) == ["test_b", "test_d"]
    assert result["versions"]["torch"]
    assert len(result["slowest"]) == 4
