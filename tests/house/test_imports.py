"""The order of the folders: core < kernels < capture < passes < lowering < runtime, and no import points up."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from house.sources import ORDER, ROOT, python_files, tree

ALLOWED = {  # (file, imported folder): why; each must still be there
    ("core/__init__.py", "passes"): "types of the names that tamis/__init__ hands out lazily",
    ("core/__init__.py", "runtime"): "types of the names that tamis/__init__ hands out lazily",
    ("core/__main__.py", "runtime"): "python -m tamis is the command",
    ("core/registry.py", "passes"): "the registry fills itself when it is first asked for",
}


def folder_of(module: str) -> str:
    """`tamis.passes.x` -> `passes`; `tamis.graph` and `tamis` -> `core`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else "core"


def module_of(path: Path) -> str:
    """`passes/methods/tome.py` -> `tamis.passes.methods.tome`; an `__init__` keeps that as its last part."""
    parts = path.with_suffix("").parts
    return ".".join(("tamis", *(parts[1:] if parts[0] == "core" else parts)))


def absolute(importer: str, level: int, name: str) -> str:
    """The module that `from ..name import` means in `importer`."""
    if level == 0:
        return name
    return ".".join([*importer.split(".")[:-level], *filter(None, [name])])


def imported(importer: str, node: ast.AST) -> Iterator[str]:
    """Modules of ours that a syntax node imports, function-level and `import_module("...")` included."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = absolute(importer, node.level, node.module or "")
        names = [base, *(f"{base}.{alias.name}" for alias in node.names)] if base == "tamis" else [base]
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__"):
            text = str(node.args[0].value)
            names = [f"tamis{text}" if text.startswith(".") else text]  # a relative one is given with "tamis"
    yield from (name for name in names if name.split(".")[0] == "tamis")


def arrows(path: Path, module: ast.Module) -> set[str]:
    """Folders that a file imports."""
    return {folder_of(name) for node in ast.walk(module) for name in imported(module_of(path), node)}


def upward(path: Path, module: ast.Module) -> set[tuple[str, str]]:
    mine = ORDER.index(path.parts[0])
    return {(path.as_posix(), folder) for folder in arrows(path, module) if ORDER.index(folder) > mine}


def test_no_import_points_up() -> None:
    found = {arrow for path in python_files(*ORDER) for arrow in upward(path, tree(path))}
    assert found - set(ALLOWED) == set(), "these files import a folder that comes after theirs"
    assert set(ALLOWED) - found == set(), "these exceptions are no longer needed: remove them"


@pytest.mark.parametrize(
    ("file", "text", "folder"),
    [
        ("kernels/x.py", "from ..passes import y", "passes"),
        ("kernels/x.py", "from .. import lowering", "lowering"),
        ("kernels/x.py", "def f():\n    import tamis.runtime.api as a", "runtime"),
        ("passes/methods/x.py", "from ...lowering.onnx import y", "lowering"),
        ("passes/methods/__init__.py", "from ...runtime import y", "runtime"),
        ("core/x.py", "from importlib import import_module\nimport_module('tamis.kernels')", "kernels"),
        ("core/x.py", "import importlib\nimportlib.import_module('.kernels.x', 'tamis')", "kernels"),
        ("core/x.py", "from .capture import y", "capture"),
    ],
)
def test_an_upward_import_is_seen(file: str, text: str, folder: str) -> None:
    assert upward(Path(file), ast.parse(text)) == {(file, folder)}


def test_downward_and_foreign_imports_are_free() -> None:
    text = (
        "from ..kernels import x\nfrom . import y\nfrom ..errors import TamisError\nimport torch.export\nimport runtime"
    )
    assert upward(Path("passes/x.py"), ast.parse(text)) == set()


def test_folders_are_never_imported_as_top_level_modules() -> None:
    """`import passes` from the checkout would make a second copy of the package."""
    found = []
    for path in python_files(*ORDER, "tests", "scripts", "benchmarks"):
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            found += [f"{path}:{node.lineno}: {name}" for name in names if name.split(".")[0] in ORDER]
    assert found == []


@pytest.mark.parametrize("folder", [folder for folder in ORDER if folder != "core"])
def test_importing_a_folder_from_the_checkout_names_the_fix(folder: str) -> None:
    # transformers imports any `kernels` it finds, so that folder objects only when something of it is used
    done = _python("from kernels import attention" if folder == "kernels" else f"import {folder}")
    assert done.returncode != 0
    assert f"ImportError: import tamis.{folder}, not {folder}" in done.stderr


def test_transformers_imports_with_the_checkout_as_current_directory() -> None:
    pytest.importorskip("transformers")
    done = _python("import transformers.activations, tamis.kernels; print('imported')")
    assert done.stdout.strip() == "imported", done.stderr


def test_the_checkout_as_current_directory_does_not_hide_the_package() -> None:
    done = _python("import tamis, tamis.passes, tamis.errors; print(tamis.passes.__name__, tamis.errors.__name__)")
    assert done.stdout.split() == ["tamis.passes", "tamis.errors"], done.stderr


def test_import_tamis_is_enough_for_the_passes() -> None:
    done = _python("import tamis; print(tamis.passes.ToMe.name, tamis.prompts.xl3m.__name__)")
    assert done.stdout.split() == ["tome", "xl3m"], done.stderr


def test_import_tamis_does_not_import_torch() -> None:
    heavy = "{'torch', 'numpy', 'onnx', 'onnxscript', 'rich', 'typer'}"
    done = _python(f"import sys, tamis; tamis.TamisError, tamis.Pipeline; print(sorted({heavy} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
