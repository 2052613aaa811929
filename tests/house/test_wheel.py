"""The wheel: built, installed on its own, and run from the checkout and from elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from house.sources import ORDER, ROOT, python_files

SOURCES = (*ORDER, "setup.py", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools would pack leftovers of earlier builds in the checkout's build folder."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=copy)
    (built,) = out.glob("tamis-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def test_every_module_is_inside(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("tamis/")}
    expected = {
        "/".join(("tamis", *(path.parts[1:] if path.parts[0] == "core" else path.parts)))
        for path in python_files(*ORDER)
    }
    tables = {f"tamis/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("tables/*.json")}
    assert inside == expected | tables | {"tamis/py.typed"}
    assert {"tamis/graph.py", "tamis/passes/methods/tome.py", "tamis/runtime/cli.py"} <= inside


def test_the_licence_is_inside(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_the_wheel_is_what_runs(installed: Path, tmp_path: Path, where: str) -> None:
    cwd = ROOT if where == "checkout" else tmp_path
    code = "import tamis, tamis.passes; print(tamis.__file__); print(tamis.passes.__file__)"
    for line in run(sys.executable, "-c", code, cwd=cwd, PYTHONPATH=str(installed)).stdout.splitlines():
        assert Path(line).is_relative_to(installed)


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
@pytest.mark.parametrize("command", ["python -m tamis", "optimize-model"])
def test_the_command(installed: Path, tmp_path: Path, where: str, command: str) -> None:
    from tamis import __version__

    cwd = ROOT if where == "checkout" else tmp_path
    start = [sys.executable, "-m", "tamis"] if command != "optimize-model" else [installed / "bin" / "optimize-model"]
    done = run(*start, "--version", cwd=cwd, PYTHONPATH=str(installed))
    assert __version__ in done.stdout
    assert "--pass" in run(*start, "--help", cwd=cwd, PYTHONPATH=str(installed), NO_COLOR="1", COLUMNS="120").stdout
