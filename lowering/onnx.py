"""`export_onnx`: a program as an ONNX file, its tamis ops as model-local functions of standard operators.

Any ONNX runtime runs the functions' bodies and a viewer shows what was inserted; `inline` is for consumers that know no
functions.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from onnxscript.optimizer import optimize
from torch.export import ExportedProgram

from .. import __version__
from ..capture.onnx.wire import skeleton
from ..errors import ExportFailed, TamisError
from ..op import NAMESPACE
from ..shape_names import dimension_names
from . import onnx_names as names
from .onnx_file import LIMIT, refuse_existing, write_whole
from .onnx_nodes import add_functions, refuse_mean_scatter, symbolic_program, translations
from .onnx_opaque import symbols_kept, translation, version_needed, write_back
from .splice import fake_mode_of, without_guards

OPSET = 18
EXPORTERS = ("torch.onnx", "onnxscript")  # whose logs tell of their own work: an operator that they did not fold


def export_onnx(
    program: ExportedProgram,
    path: str | os.PathLike[str],
    *,
    inline: bool = False,
    contrib: bool = False,
    opset: int = OPSET,
    metadata: Mapping[str, str] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dimensions: Mapping[str, str] | None = None,
    weight_names: Mapping[str, str] | None = None,
    results: Sequence[Sequence[tuple[int, str]]] = (),
    overwrite: bool = False,
    external_over: int = LIMIT,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write the program to `path`, whole or not at all, and return the path.

    inline         put the bodies of the functions in place of their calls
    contrib        ONNX Runtime's own operators where they compute the same: no other runtime knows the file then
    opset          version of the standard operators, 18 or newer; a newer one is taken where operators need it
    metadata       key-value pairs for the file (the recipe)
    input_names    default: the names of the arguments;  output_names  default: paths in the result
    dimensions     names of the program's symbols, over those found: batch, sequence;  "": without a name
    weight_names   other names for weights;  results  (axis, name) of dynamic dimensions per output, as `dimensions`
    external_over  bytes of weights from which on they go to `NAME.onnx.data`
    check          called with the finished file before it is moved into place; if it raises, nothing is kept

    Raises:
        OutputExists, OutputNotWritable: before any work where possible.
        ExportFailed: an operator has no ONNX form, a scatter averages, or the ONNX checker refuses the file.
    """
    path = Path(path)
    refuse_existing(path, overwrite=overwrite)
    refuse_mean_scatter(program.graph, str(path))
    model = onnx_model(program, str(path), opset=opset, inline=inline, contrib=contrib)
    names.rename_weights(model, weight_names or {})
    _name_all(model, program, input_names, output_names, dimensions)
    names.rename_results(model, results)
    model.producer_name, model.producer_version = "tamis", __version__
    model.metadata_props.update(metadata or {})

    def checked(draft: Path) -> None:
        check_file(draft, shown=str(path))
        if check is not None:
            check(draft)

    write_whole(model, path, external_over=external_over, check=checked)
    return path


def onnx_model(program: ExportedProgram, path: str, *, opset: int, inline: bool, contrib: bool = False) -> ir.Model:
    """The program as an ONNX model in memory; `path` is what errors call it."""
    symbolic, calls = symbolic_program(program, contrib)
    try:
        # under gradients torch chooses another kernel for attention with a learned bias, and with it other strides
        with torch.no_grad(), _quiet(), symbols_kept(program.graph), without_guards(fake_mode_of(program.graph)):
            exported = torch.onnx.export(
                symbolic,
                dynamo=True,
                opset_version=max(opset, calls.version, version_needed(program.graph)),
                optimize=True,
                verbose=False,
                custom_translation_table={**translations(), **translation()},
            )
        assert exported is not None  # it is None only for export to a file
        model = exported.model
    except TamisError:
        raise
    except Exception as error:
        hint = "the node named has no ONNX form; a pass cannot change that, another opset may."
        raise ExportFailed(path=path, kind="ONNX", reason=_innermost(error), hint=hint) from error
    add_functions(model, calls.functions)
    if inline:
        with _quiet():
            model = optimize(InlinePass()(model).model)
        model.opset_imports.pop(NAMESPACE, None)
    _strip(model)
    write_back(model, path)
    return model


def _strip(model: ir.Model) -> None:
    """Take out stack traces and the like: they name files of whoever exported.  Which module a node is of stays."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        kept = node.metadata_props.get("namespace")
        node.metadata_props.clear()
        if kept:
            node.metadata_props["namespace"] = kept
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def check_file(path: Path, shown: str) -> None:
    """Raise ExportFailed unless the ONNX checker, shape inference included, accepts the file.

    It is given the file without its large tensors, which it would copy several times.
    """
    light = path.with_name(f"{path.name}.light")
    try:
        light.write_bytes(skeleton(path))
        onnx.checker.check_model(str(light), full_check=True)
    except Exception as error:
        hint = "this is a bug in tamis or in an exporter; please report the model and the recipe."
        raise ExportFailed(path=shown, kind="ONNX", reason=f"the checker says: {error}", hint=hint) from error
    finally:
        light.unlink(missing_ok=True)


def _name_all(
    model: ir.Model,
    program: ExportedProgram,
    inputs: Sequence[str] | None,
    outputs: Sequence[str] | None,
    dimensions: Mapping[str, str] | None,
) -> None:
    names.rename_dimensions(model, {**dimension_names(program), **(dimensions or {})})
    names.rename_values(model, model.graph.inputs, inputs or [str(value.name) for value in model.graph.inputs])
    names.rename_values(model, model.graph.outputs, outputs or names.output_names(program))


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter from stdout, which carries results, and its warnings about itself from the user."""
    loggers = [logging.getLogger(name) for name in EXPORTERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
