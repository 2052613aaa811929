"""What the sources look like: sizes, names, docstrings, and words that do not belong in them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from house.sources import ALL, ROOT, Function, functions, python_files, tracked_files, tree

FILE_LINES = 320
FUNCTION_LINES = 60
VAGUE = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
DOCUMENTED = ("core", "kernels", "capture", "passes")


def test_files_are_short() -> None:
    lines = {str(path): len((ROOT / path).read_text().splitlines()) for path in python_files(*ALL)}
    assert len(lines) > 20
    assert {path: count for path, count in lines.items() if count > FILE_LINES} == {}


def test_functions_are_short() -> None:
    def size(node: Function) -> int:
        return (node.end_lineno or node.lineno) - node.lineno + 1

    long = [
        f"{path}:{node.lineno} {node.name}: {size(node)} lines"
        for path in python_files(*ALL)
        for node in functions(tree(path))
        if size(node) > FUNCTION_LINES
    ]
    assert long == []


def test_files_say_what_they_do() -> None:
    assert [str(path) for path in python_files(*ALL) if path.name in VAGUE] == []


def exempt(path: Path, node: ast.ClassDef | Function) -> bool:
    """Errors (users read their template) and ONNX functions (the module of their op defines them)."""
    is_script = any("script" in ast.unparse(decorator) for decorator in node.decorator_list)
    return is_script or (isinstance(node, ast.ClassDef) and path.name == "errors.py")


def undocumented(path: Path, module: ast.Module) -> Iterator[str]:
    """The module, its public classes and functions, and public methods that no base class documents."""
    if ast.get_docstring(module) is None:
        yield f"{path}: module"
    for node in module.body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            if not exempt(path, node) and ast.get_docstring(node) is None:
                yield f"{path}:{node.lineno} {node.name}"
            if isinstance(node, ast.ClassDef) and not node.bases:
                yield from (
                    f"{path}:{method.lineno} {node.name}.{method.name}"
                    for method in node.body
                    if isinstance(method, Function)
                    and not method.name.startswith("_")
                    and not ast.get_docstring(method)
                )


def test_public_names_have_docstrings() -> None:
    assert [name for path in python_files(*DOCUMENTED) for name in undocumented(path, tree(path))] == []


def test_a_missing_docstring_is_seen() -> None:
    text = '"""M."""\nclass A:\n    """A."""\n    def b(self): ...\n    def _c(self): ...\ndef d(): ...\ndef _e(): ...'
    assert list(undocumented(Path("x.py"), ast.parse(text))) == ["x.py:4 A.b", "x.py:6 d"]


def _places() -> re.Pattern[str]:
    """Paths and hosts of one machine, put together here so that this file does not hold them itself."""
    homes = "|".join(["root", "work", r"home/\w+", r"Users/\w+", r"mnt/\w+", r"opt/pypi\S*"])
    hosts = "|".join(["local" + r"host:\d+", r"10\.\d+\.\d+\.\d+", r"192\.168\.\d+\.\d+", "file" + ":///"])
    return re.compile(rf"(?<![\w.\-/}}\]])/({homes})(?=[/\s\"'`:)]|$)|({hosts})", re.MULTILINE)


@pytest.mark.parametrize("text", ["cd /ro" + "ot/x", '"/wo' + 'rk/main"', "http://10" + ".0.0.7/simple"])
def test_a_machine_path_is_seen(text: str) -> None:
    assert _places().search(text)


@pytest.mark.parametrize("text", ["https://x.org/root/a", "build/work", "network/root.py", "$OUT/root/", "a 10.5 b"])
def test_other_text_is_not_taken_for_one(text: str) -> None:
    assert _places().search(text) is None


def test_no_file_names_a_machine() -> None:
    files = tracked_files()
    if not files:
        pytest.skip("not a git checkout")
    found = []
    for path in files:
        text = (ROOT / path).read_bytes().decode("utf-8", errors="replace")
        found += [f"{path}: {match.group()}" for match in _places().finditer(text)]
    assert found == []


GLOBAL_SEEDS = {"torch.manual_seed", "torch.cuda.manual_seed", "np.random.seed", "numpy.random.seed", "random.seed"}


def test_only_the_zoo_seeds_globally() -> None:
    found = [
        f"{path}:{node.lineno}"
        for path in python_files("tests")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in GLOBAL_SEEDS and path != Path("tests/zoo.py")
    ]
    assert found == []
