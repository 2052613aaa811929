"""scripts/typecheck really looks at the package: it finds planted errors, strictly where it should."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from house.sources import ORDER, ROOT

UNTYPED = "def f(x):\n    return x\n"
WRONG = "count: int = 'three'\n"


def check(checkout: Path, **files: str) -> tuple[int, list[str]]:
    """Exit status and error lines for a small checkout with these files (`passes__x` is passes/x.py)."""
    for folder in ORDER:
        (checkout / folder).mkdir(exist_ok=True)
        (checkout / folder / "__init__.py").write_text("")
    for name, text in files.items():
        (checkout / f"{name.replace('__', '/')}.py").write_text(text)
    command = [sys.executable, ROOT / "scripts" / "typecheck", checkout]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, [line for line in done.stdout.splitlines() if ": error: " in line]


def test_clean_files_pass(tmp_path: Path) -> None:
    texts = {"core__x": "def f(x: int) -> int:\n    return x\n", "passes__x": "from ..x import f\n\ny: int = f(1)\n"}
    assert check(tmp_path, **texts) == (0, [])


def test_wrong_types_are_found_everywhere(tmp_path: Path) -> None:
    status, lines = check(tmp_path, **{f"{folder}__x": WRONG for folder in ORDER})
    assert status == 1
    assert sorted(line.split(":")[0] for line in lines) == sorted(f"{folder}/x.py" for folder in ORDER)


def test_annotations_are_asked_for_where_it_is_strict(tmp_path: Path) -> None:
    status, lines = check(tmp_path, **{f"{folder}__x": UNTYPED for folder in ORDER})
    assert status == 1
    assert sorted(line.split("/")[0] for line in lines) == ["capture", "core", "passes"]


def test_types_are_seen_across_folders(tmp_path: Path) -> None:
    """A relative import that did not resolve would be Any, and any misuse of it would pass."""
    texts = {"core__x": "def f(x: int) -> int:\n    return x\n", "runtime__y": "from ..x import f\n\nf('a')\n"}
    status, lines = check(tmp_path, **texts)
    assert status == 1
    assert [line.split(": error:")[0] for line in lines] == ["runtime/y.py:3"]


@pytest.mark.parametrize("file", ["setup.py", "scripts/link_farm.py"])
def test_the_folder_lists_agree(file: str) -> None:
    (found,) = (
        node.value
        for node in ast.parse((ROOT / file).read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FOLDERS"
    )
    assert tuple(ast.literal_eval(found)) == ORDER[1:]
