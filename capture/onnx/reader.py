"""`read_onnx`: an .onnx file, checked, as a graph of onnx-ir and its weights as torch tensors."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from onnx_ir.passes.common import InlinePass
from torch import Tensor

from ...errors import CorruptModel, ModelNotFound
from ...onnx_errors import MalformedGraph
from .packed import unpack_weights
from .tensors import as_torch
from .wellformed import check_model
from .wire import skeleton

KIND = "an ONNX model"
LARGEST = 2**28  # entries of a sparse tensor made dense, and of an input: a few bytes must not ask for all memory


@dataclass(frozen=True)
class OnnxFile:
    """What a file holds.

    graph     nodes in order; functions of the file's own are put in place of their calls
    weights   initializers by value, those of inner graphs too; an input that has one (its default) is among them
    metadata  the model's own key-value pairs
    """

    path: str
    graph: ir.Graph
    weights: dict[ir.Value, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> list[ir.Value]:
        """Inputs that the caller must give: those without an initializer."""
        return [value for value in self.graph.inputs if value not in self.weights]


def read_onnx(path: str | os.PathLike[str]) -> OnnxFile:
    """Read and check a file.  Only plain files in its own folder are read; nothing in it is run.

    Raises:
        ModelNotFound: there is no such file.
        CorruptModel: it is no ONNX file, or cut short.
        MalformedGraph, OpsetUnknown, TypeUnsupported, UnsafeExternalData, ExternalDataMissing: see `check_model`.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelNotFound(path=str(path), hint="name an .onnx file.")
    return from_proto(_parsed(file, str(path)), str(path), file.parent)


def from_proto(model: onnx.ModelProto, path: str, folder: Path) -> OnnxFile:
    """The same for a model in memory; external data lies in `folder`.  The model is not to be used afterwards."""
    check_model(model, path, folder)
    _make_dense(model.graph, path)
    try:
        read = ir.from_proto(model)
        if read.functions:
            read = InlinePass()(read).model
    except Exception as error:
        raise MalformedGraph(path=path, reason=_reason(error)) from error
    _free_sizes([*read.graph.inputs, *read.graph.outputs])
    weights = {}
    for graph in read.graphs():
        for value in graph.initializers.values():
            assert value.const_value is not None
            weights[value] = as_torch(value.const_value, folder)
            value.const_value = None  # what holds the file's bytes is let go
    unpack_weights(list(read.graphs()), weights)
    return OnnxFile(path, read.graph, weights, dict(read.metadata_props))


def _free_sizes(values: list[ir.Value]) -> None:
    """Negative sizes, which some exporters write for dynamic dimensions, as dimensions without a name."""
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([None if isinstance(size, int) and size < 0 else size for size in value.shape])


def _parsed(file: Path, path: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(skeleton(file))
    except (DecodeError, ValueError) as error:
        reason = "it is text" if _is_text(file) else "its bytes are not those of a protobuf message, or end too early"
        raise CorruptModel(path=path, kind=KIND, reason=reason) from error
    if not model.ir_version and not model.graph.node:
        reason = "it is empty" if not file.stat().st_size else "there is no graph in it"
        raise CorruptModel(path=path, kind=KIND, reason=reason)
    return model


def _is_text(file: Path) -> bool:
    with file.open("rb") as stream:
        start = stream.read(512)
    return all(byte >= 32 or byte in b"\t\r\n" for byte in start)


def _make_dense(graph: onnx.GraphProto, path: str) -> None:
    """Sparse initializers as dense ones; raises MalformedGraph where indices or sizes do not fit."""
    for sparse in graph.sparse_initializer:
        name = sparse.values.name
        if any(size < 0 for size in sparse.dims) or math.prod(sparse.dims) > LARGEST:
            reason = f"sparse tensor {name!r} has sizes {list(sparse.dims)}: negative, or more than {LARGEST} entries"
            raise MalformedGraph(path=path, reason=reason)
        try:
            dense = _dense(sparse)
        except (ValueError, IndexError) as error:
            raise MalformedGraph(path=path, reason=f"sparse tensor {name!r}: {error}") from error
        graph.initializer.append(numpy_helper.from_array(dense, name))
    del graph.sparse_initializer[:]


def _dense(sparse: onnx.SparseTensorProto) -> np.ndarray[Any, Any]:
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return dense


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
