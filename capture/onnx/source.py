"""`load_onnx`: an ONNX file as a module with an example call and the file's names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from torch import Tensor

from ...errors import InputMismatch
from ...graph import Interface, passes_of
from ...onnx_errors import ReducedBefore
from ..dims import Axes
from .example import example_of
from .module import OnnxModule
from .reader import read_onnx


@dataclass(frozen=True)
class Loaded:
    """A module made of a file, inputs to capture it at, its dynamic dimensions, and what the file calls things."""

    module: OnnxModule
    args: tuple[Tensor, ...]
    axes: Axes
    interface: Interface


def load_onnx(path: str, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Loaded:
    """Read a file and make example inputs, unless some are given: by position, by name, or as one dict.

    Raises:
        ModelNotFound, CorruptModel, MalformedGraph, OpsetUnknown, UnsafeExternalData, ExternalDataMissing: the file.
        TypeUnsupported: the file, or an input that is no tensor or has no declared rank.
        UnknownOps: operations that the table lacks, all of them.
        InputMismatch: the inputs given are not the file's.
        ReducedBefore: passes made the file, by the recipe in it.
    """
    file = read_onnx(path)
    if passes := passes_of(file.metadata):
        raise ReducedBefore(path=path, passes=" + ".join(passes))
    module = OnnxModule(file)
    example = example_of(module, path)
    interface = Interface(
        inputs=tuple(str(value.name) for value in module.inputs),
        outputs=tuple(str(value.name) for value in module.outputs),
        dimensions=tuple(map(_dynamic, module.inputs)),
        metadata=file.metadata,
        weights=module.file_names(),
        results=tuple(map(_dynamic, module.outputs)),
    )
    return Loaded(module, _given(module, path, args, dict(kwargs or {})) or example.args, example.axes, interface)


def _dynamic(value: ir.Value) -> tuple[tuple[int, str], ...]:
    """(dimension, name) of a value's dynamic dimensions; "" for one without a name."""
    sizes = enumerate(value.shape or ())
    return tuple((axis, size.value or "") for axis, size in sizes if isinstance(size, ir.SymbolicDim))


def _given(module: OnnxModule, path: str, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The caller's inputs in the file's order; none when there are none."""
    if isinstance(args, tuple | list) and len(args) == 1 and isinstance(args[0], Mapping):
        args = args[0]
    if isinstance(args, Mapping):
        args, kwargs = (), {**args, **kwargs}
    if not args and not kwargs:
        return ()
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        hint = f"its inputs are {', '.join(module.input_names)}."
        raise InputMismatch(where=path, rule="the file's inputs must be given", got=error, hint=hint) from error
    return bound.args
