"""onnx_node: a node of an ONNX file that tamis has no operation for, evaluated by ONNX Runtime.

    out[0], out[1], ... = what ONNX Runtime answers for the node on inputs[0], inputs[1], ...

inputs  any numbers, as the node takes them
text    the node with its constants, and how the sizes of its results follow from those of its inputs: `Opaque.text`
->      its results; a size that depends on data is a new symbol when the graph is traced

Runs on the CPU, wherever the tensors are, and has no derivative.  It is no `Op`: there is nothing to inline, to count
or to lower, and `lowering.onnx_opaque` writes the node back as it was.

Raises OpaqueFailed when ONNX Runtime does, or answers with other sizes or types than the text says; MissingDependency
without ONNX Runtime.  Source: ours.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from ..errors import MissingDependency
from ..onnx_errors import OpaqueFailed
from ..op import NAMESPACE
from ..opaque import OP, Opaque, Result, Size

Array = np.ndarray[Any, Any]


class Session:
    """A model of one node in ONNX Runtime."""

    def __init__(self, model: bytes) -> None:
        """Load the model; raises MissingDependency, or what ONNX Runtime raises."""
        try:
            import onnxruntime
        except ImportError as error:
            package = {"package": "onnxruntime", "install": "tamis[cpu]"}
            raise MissingDependency(what="evaluating an operator that tamis has no form for", **package) from error
        _refuse_external(model)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # there may be many, mostly idle
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.inputs = [one.name for one in self._session.get_inputs()]

    def __call__(self, arrays: list[Array]) -> list[Any]:
        """The node's results; raises what ONNX Runtime raises."""
        return list(self._session.run(None, dict(zip(self.inputs, arrays, strict=True))))


def _refuse_external(model: bytes) -> None:
    """A model in memory has no folder, so none of its tensors may lie in a file."""
    graph = onnx.ModelProto.FromString(model).graph
    inside = [one.t for node in graph.node for one in node.attribute if one.HasField("t")]
    if any(one.data_location == onnx.TensorProto.EXTERNAL for one in (*graph.initializer, *inside)):
        raise ValueError("its data lie in a file of their own")


@functools.lru_cache(maxsize=256)
def parsed(text: str) -> Opaque:
    """The node that a text says."""
    return Opaque.from_text(text)


@functools.lru_cache(maxsize=256)
def session_of(model: bytes) -> Session:
    """One session for each model, kept."""
    return Session(model)


def why(error: BaseException) -> str:
    """What ONNX Runtime says, without its own error codes and places in its source."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", first)
    return re.sub(r"\S*onnxruntime_src\S* .*?\)(?: \[with [^]]*\])? ?", "", text).rstrip(". ")


def evaluate(inputs: list[Tensor], text: str) -> list[Tensor]:
    """See the module."""
    opaque = parsed(text)
    device = inputs[0].device if inputs else torch.device("cpu")
    try:
        arrays = session_of(opaque.model)([value.detach().cpu().numpy() for value in inputs])
    except MissingDependency:
        raise
    except Exception as error:
        raise OpaqueFailed(node=opaque.node, op=opaque.op, reason=why(error)) from error
    shapes = [tuple(value.shape) for value in inputs]
    for place, (array, result) in enumerate(zip(arrays, opaque.results, strict=True)):
        _check(opaque, place, array, result, shapes)
    return [torch.from_numpy(array).to(device) for array in arrays]


def _check(opaque: Opaque, place: int, array: Array, result: Result, shapes: list[tuple[int, ...]]) -> None:
    """Hold a result against what the graph around the node was made for."""
    sizes = [size.of(shapes) if isinstance(size, Size) else size for size in result.sizes]
    fits = len(sizes) == array.ndim and all(
        isinstance(a, str) or a == b for a, b in zip(sizes, array.shape, strict=True)
    )
    if not fits or str(array.dtype) != result.dtype:
        want = f"{result.dtype}[{', '.join(map(str, sizes))}]"
        got = f"{array.dtype}{list(array.shape)}"
        reason = f"its output {place} is {got} where {want} follows from its inputs {[list(one) for one in shapes]}"
        raise OpaqueFailed(node=opaque.node, op=opaque.op, reason=reason)


def fake(inputs: list[Tensor], text: str) -> list[Tensor]:
    """Shape rule."""
    shapes = [tuple(value.shape) for value in inputs]
    unknown: dict[str, Any] = {}

    def size(value: Any) -> Any:
        if isinstance(value, int):
            return value
        if not isinstance(value, str):
            return value.of(shapes)
        if value not in unknown:
            unknown[value] = torch.library.get_ctx().new_dynamic_size()
        return unknown[value]

    return [
        inputs[0].new_empty([size(one) for one in result.sizes], dtype=getattr(torch, result.dtype))
        for result in parsed(text).results
    ]


LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
LIBRARY.define(f"{OP}(Tensor[] inputs, str text) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl(OP, evaluate, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::{OP}", fake, lib=LIBRARY)
