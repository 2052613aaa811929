"""What tamis keeps inside its artifacts: recipe and report in a `.pt2` member, the recipe in an ONNX file's metadata.

Nothing here imports torch, and nothing from a file is run.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..error_text import first_line
from ..errors import CorruptModel
from ..graph import RECIPE
from ..recipe_errors import PlainProgram, RecipeInvalid

EXTRA = "tamis.json"  # the member's name
SAVED = "a model saved by tamis"


def extra_of(model: Any) -> dict[str, Any]:
    """What goes into a `.pt2` file beside a `CompiledModel`'s program."""
    return {
        "recipe": model.recipe.to_dict(),
        # where it was written and how fast it ran are no part of it: one recipe makes one file
        "report": model.report.with_changes(artifacts=(), benchmarks=()).to_dict(),
        "name": model.graph.name,
        "token_map": model.token_map,
        "interface": model.graph.interface and asdict(model.graph.interface),
    }


def read_extra(path: str | Path) -> dict[str, Any]:
    """What `CompiledModel.save` put beside the program: name, recipe, report, token_map.

    Raises:
        PlainProgram: an exported program without it.
        CorruptModel: the file or the member cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = next((name for name in archive.namelist() if name.endswith(f"extra/{EXTRA}")), None)
            if member is None:
                raise PlainProgram(path=path)
            extra = json.loads(archive.read(member))
            return {**extra, "name": str(extra["name"]), "recipe": extra["recipe"], "report": extra["report"]}
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise CorruptModel(path=path, kind=SAVED, reason=first_line(error).rstrip(".")) from error


def recipe_in_onnx(path: str | Path) -> Any:
    """The recipe in an ONNX file, as plain data; raises RecipeInvalid when there is none."""
    import onnx

    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except Exception as error:
        raise RecipeInvalid(path=path, reason=f"it cannot be read as ONNX ({first_line(error).rstrip('.')})") from error
    for entry in model.metadata_props:
        if entry.key == RECIPE:
            return json.loads(entry.value)
    raise RecipeInvalid(path=path, reason="this ONNX file was not made by tamis")
