"""Artifacts of a `CompiledModel`: `.pt2` packages written and read, ONNX files written and checked, device moves."""

from __future__ import annotations

import copy
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CorruptModel, ExportFailed, TamisError, UnknownModelFormat, UntrustedNativeCode
from ..graph import TokenGraph
from ..report import Report
from ..target import Target
from .files import check_file, whole
from .inputs import example_call, other_sizes
from .recipe import Recipe

if TYPE_CHECKING:
    from .compiled import CompiledModel

EXTRA = "tamis.json"
BUDGETS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative L2, ONNX Runtime against torch


def save_package(model: CompiledModel, path: str, *, overwrite: bool) -> str:
    """Write program, recipe and report; see `CompiledModel.save`."""
    extra = {
        "recipe": model.recipe.to_dict(),
        "report": model.report.to_dict(),
        "name": model.graph.name,
        "token_map": model.token_map,
    }
    with whole(Path(path), overwrite) as temporary:
        try:
            torch.export.save(model.graph.program, temporary, extra_files={EXTRA: json.dumps(extra)})
        except Exception as error:
            hint = "save the recipe instead, and compile again where the model is needed."
            raise ExportFailed(
                path=path, kind="a torch.export program", reason=_first_line(error), hint=hint
            ) from error
    return path


def load_package(path: str, *, trusted: bool) -> CompiledModel:
    """Read what `save_package` wrote; see `tamis.load`."""
    from ..capture.safe_pt2 import load_program
    from .compiled import CompiledModel

    try:
        program = load_program(path)
    except UntrustedNativeCode as error:
        if not trusted:
            raise
        accepted = "what CompiledModel.save wrote; AOTInductor packages cannot be loaded yet"
        raise UnknownModelFormat(path=path, accepted=accepted) from error
    extra = _read_extra(path)
    recipe = Recipe.from_dict(extra["recipe"], path)
    call = example_call(program)
    return CompiledModel(
        graph=TokenGraph(program, name=extra["name"], source_hash=recipe.source_hash),
        original=None,
        call=call if call is not None else ((), {}),
        recipe=recipe,
        report=Report.from_dict(extra["report"]),
        target=_device_of(program),
        mode=recipe.options.get("mode"),
        token_map=bool(extra["token_map"]),
    )


def export_checked(model: CompiledModel, path: str, *, inline: bool, overwrite: bool, check: bool) -> str:
    """Write an ONNX file and hold it against torch; see `CompiledModel.export`."""
    from ..lowering.callables import lower
    from ..lowering.onnx import export_onnx
    from ..lowering.onnx_check import check_onnx

    program = model.graph.program
    metadata = {"tamis.recipe": model.recipe.to_json(), "tamis.version": model.recipe.versions.get("tamis", "")}

    def hold_against_torch(draft: Path) -> None:
        calls = other_sizes(program, model.example_call) or [model.example_call]
        check_onnx(draft, lower(program, model.target), calls, budget_of(program), shown=path)

    check_file(Path(path), overwrite)
    try:
        export_onnx(
            program,
            path,
            inline=inline,
            metadata=metadata,
            overwrite=overwrite,
            check=hold_against_torch if check else None,
        )
    except TamisError:
        raise
    except Exception as error:
        hint = "save it as .pt2 instead, or report the model and the recipe."
        raise ExportFailed(path=path, kind="ONNX", reason=_first_line(error), hint=hint) from error
    return path


def budget_of(program: Any) -> float:
    """Relative L2 difference between ONNX Runtime and torch that rounding explains, by the coarsest weight dtype."""
    dtypes = {tensor.dtype for tensor in program.state_dict.values()}
    return max([BUDGETS[dtype] for dtype in dtypes if dtype in BUDGETS], default=BUDGETS[torch.float32])


def moved(graph: TokenGraph, device: torch.device) -> TokenGraph:
    """The graph with program and weights on another device; the given one stays where it is."""
    from torch.export.passes import move_to_device_pass

    return replace(graph, program=move_to_device_pass(copy.deepcopy(graph.program), device))


def _read_extra(path: str) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            member = next((name for name in archive.namelist() if name.endswith(f"extra/{EXTRA}")), None)
            if member is None:
                kind, reason = "a model saved by tamis", "it holds no recipe; tamis.compile takes plain programs"
                raise CorruptModel(path=path, kind=kind, reason=reason)
            extra = json.loads(archive.read(member))
            return {**extra, "name": str(extra["name"]), "recipe": extra["recipe"], "report": extra["report"]}
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise CorruptModel(path=path, kind="a model saved by tamis", reason=_first_line(error)) from error


def _device_of(program: Any) -> Target:
    devices = {tensor.device.type for tensor in program.state_dict.values()}
    return Target("cuda" if "cuda" in devices else "cpu")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
