"""Artifacts of a `CompiledModel`: `.pt2` packages written and read, ONNX files written and checked, device moves."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..error_text import first_line
from ..errors import ExportFailed, TamisError, UntrustedNativeCode
from ..graph import RECIPE, Interface, TokenGraph
from ..op import OPS
from ..report import Report
from ..target import Target
from .binaries import use_binaries
from .embedded import EXTRA, extra_of, read_extra
from .files import check_file, whole
from .inputs import example_call, other_sizes
from .ledger import layers_of_nodes
from .recipe import Recipe
from .verify import real_tokens_of

if TYPE_CHECKING:
    from .compiled import CompiledModel
    from .native import NativeModel

BUDGETS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative L2, ONNX Runtime against torch
ROUNDED = 5e-3  # where values are rounded to integers: a difference in the last bit may move one by a step


def save_package(model: CompiledModel, path: str, *, overwrite: bool) -> str:
    """Write program, recipe and report; see `CompiledModel.save`."""
    extra = extra_of(model)
    with whole(Path(path), overwrite) as temporary:
        draft = temporary.with_name("model.pt2")  # the file's name becomes part of its content
        try:
            torch.export.save(_reproducible(model.graph.program), draft, extra_files={EXTRA: json.dumps(extra)})
            draft.rename(temporary)
        except Exception as error:
            hint = "save the recipe instead, and compile again where the model is needed."
            raise ExportFailed(
                path=path, kind="a torch.export program", reason=first_line(error).rstrip("."), hint=hint
            ) from error
    return path


def load_package(path: str, *, trusted: bool) -> CompiledModel | NativeModel:
    """Read what `save_package` or `save_native` wrote; see `tamis.load`."""
    from ..capture.safe_pt2 import load_program
    from ..lowering.callables import is_on_gpu
    from .compiled import CompiledModel

    try:
        program = load_program(path)
    except UntrustedNativeCode:
        if not trusted:
            raise
        from .native import load_native

        return load_native(path)
    extra = read_extra(path)
    recipe = Recipe.from_dict(extra["recipe"], path)
    call = example_call(program)
    names = extra.get("interface")
    interface = names and Interface.from_dict(names)
    return CompiledModel(
        graph=TokenGraph(program, name=extra["name"], source_hash=recipe.source_hash, interface=interface),
        original=None,
        call=call if call is not None else ((), {}),
        recipe=recipe,
        report=_with_note(Report.from_dict(extra["report"]), use_binaries(Path(path).parent, trusted=trusted)),
        target=Target("cuda" if is_on_gpu(program) else "cpu"),
        mode=recipe.options.get("mode"),
        token_map=bool(extra["token_map"]),
    )


def _with_note(report: Report, note: str) -> Report:
    return report.with_changes(notes=(*report.notes, note)) if note else report


def export_checked(
    model: CompiledModel, path: str, *, inline: bool, ort_contrib: bool, overwrite: bool, check: bool
) -> str:
    """Write an ONNX file and hold it against torch; see `CompiledModel.export`."""
    from ..lowering.callables import lower
    from ..lowering.onnx import export_onnx
    from ..lowering.onnx_check import check_onnx
    from ..lowering.onnx_names import file_names

    program, interface = model.graph.program, model.graph.interface
    metadata = {
        **(interface.metadata if interface else {}),
        RECIPE: model.recipe.to_json(),
        "tamis.version": model.recipe.versions.get("tamis", ""),
    }

    def hold_against_torch(draft: Path) -> None:
        calls = other_sizes(program, model.example_call) or [model.example_call]
        reference, compared = lower(program, model.target), real_tokens_of(program)
        budget, as_written = budget_of(program), is_quantised(program)
        check_onnx(draft, reference, calls, budget, compared=compared, shown=path, as_written=as_written)

    check_file(Path(path), overwrite)
    try:
        export_onnx(
            program,
            path,
            inline=inline,
            contrib=ort_contrib,
            metadata=metadata,
            **file_names(program, interface, token_map=model.token_map),
            overwrite=overwrite,
            check=hold_against_torch if check else None,
        )
    except TamisError:
        raise
    except Exception as error:
        if model.original is not None:
            model.run_original()  # raises InputMismatch when the example inputs are to blame
        hint = "save it as .pt2 instead, or report the model and the recipe."
        raise ExportFailed(path=path, kind="ONNX", reason=first_line(error).rstrip("."), hint=hint) from error
    if ort_contrib:
        notes = (*model.report.notes, *contrib_notes(model))
        model.report = model.report.with_changes(notes=tuple(dict.fromkeys(notes)))
    return path


def contrib_notes(model: CompiledModel) -> list[str]:
    """What a file with ONNX Runtime's own operators calls for attention, and where it calls none of them, why."""
    from ..lowering.onnx_contrib import contrib_forms

    layers = {} if model.original is None else layers_of_nodes(model.original, model.graph.program)
    places: dict[str, list[str]] = {}
    for form in contrib_forms(model.graph.program):
        said = f"has {form.function}" if form.function else f"has standard operators: {form.reason}"
        name = form.node.name
        places.setdefault(said, []).append(f"layer {layers[name]}" if name in layers else name)
    if not places:
        return ["the ONNX file has standard operators alone: ONNX Runtime's own are for attention, and there is none"]
    return [f"the ONNX file {said} ({', '.join(at)})" for said, at in places.items()]


def is_quantised(program: Any) -> bool:
    """Whether values are rounded to integers on the way."""
    return any(op.captured and op.call in {node.target for node in program.graph.nodes} for op in OPS.values())


def budget_of(program: Any) -> float:
    """Relative L2 difference between ONNX Runtime and torch that rounding explains, by the coarsest weight dtype."""
    if is_quantised(program):
        return ROUNDED
    dtypes = {tensor.dtype for tensor in program.state_dict.values()}
    return max([BUDGETS[dtype] for dtype in dtypes if dtype in BUDGETS], default=BUDGETS[torch.float32])


def moved(graph: TokenGraph, device: torch.device) -> TokenGraph:
    """The graph with program and weights on another device; the given one stays where it is."""
    from torch.export.passes import move_to_device_pass

    return replace(graph, program=move_to_device_pass(copy.deepcopy(graph.program), device))


def _reproducible(program: Any) -> Any:
    """The program without the history of its nodes, which holds addresses in memory."""
    for node in program.graph.nodes:
        node.meta.pop("from_node", None)
    return program
