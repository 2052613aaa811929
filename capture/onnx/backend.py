"""The `onnx.backend` interface over capture: a model is exported by `torch.export` and the program is run.

    prepared = backend.prepare(model)
    results = prepared.run([array, ...])

Only functions of the table evaluate nodes here; ONNX Runtime is not asked for what they lack.
Inputs that only say sizes or conditions (the shape of a Reshape, the trip count of a Loop) are constants of a captured
program, as Python integers are in `torch.export`.  A call with other values, shapes or types captures again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.backend.base import Backend, BackendRep
from torch import Tensor
from torch.utils import _pytree as pytree

from .evaluate import read_by_value
from .module import OnnxModule
from .reader import OnnxFile, from_proto
from .tensors import from_numpy

Arrays = tuple[Any, ...]


class CapturedModel(BackendRep):
    """A model, captured once for each combination of input types, shapes and sizes given as values."""

    def __init__(self, model: onnx.ModelProto, path: str = "model.onnx") -> None:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        self._file: OnnxFile = from_proto(copy, path, Path(path).parent)
        self._fixed = read_by_value(self._file)
        self._programs: dict[str, Callable[..., Any]] = {}

    def run(self, inputs: Any, **kwargs: Any) -> Arrays:
        """Run on a list of arrays, in the order of the inputs, or a mapping of them by name; returns the outputs."""
        names = [str(value.name) for value in self._file.inputs]
        given = inputs if isinstance(inputs, dict) else dict(zip(names, inputs, strict=True))
        tensors = {name: _as_tensors(given[name]) for name in names}
        fixed = {name: tensors.pop(name) for name in names if name in self._fixed and isinstance(tensors[name], Tensor)}
        values = [(name, x.dtype, x.tolist()) for name, x in fixed.items()]
        shapes = pytree.tree_map_only(Tensor, lambda x: (x.dtype, tuple(x.shape)), tensors)
        key = repr((values, shapes))
        args = tuple(tensors.values())
        if key not in self._programs:
            self._programs[key] = captured(OnnxModule(self._file, fixed, carry=False), args)
        with torch.no_grad():
            return tuple(map(_as_array, _outputs(self._programs[key](*args))))


def captured(module: OnnxModule, args: tuple[Tensor, ...]) -> Callable[..., Any]:
    """The module through `torch.export`, at these shapes."""
    with torch.no_grad():
        return torch.export.export(module, args, strict=False).module()


def _as_tensors(value: Any) -> Any:
    """An array as a tensor, a list of arrays as a list; None stays what it is."""
    if isinstance(value, list):
        return [_as_tensors(one) for one in value]
    return None if value is None else from_numpy(np.asarray(value))


def _outputs(result: Any) -> list[Any]:
    return list(result.values()) if isinstance(result, dict) else [result]


def _as_array(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return pytree.tree_map_only(Tensor, _as_array, value)
    if value.dtype == torch.bfloat16 or "float8" in str(value.dtype):
        bits = value.detach().contiguous().view(torch.int16 if value.dtype == torch.bfloat16 else torch.uint8)
        return bits.numpy().view(getattr(ml_dtypes, str(value.dtype).removeprefix("torch.")))
    return value.detach().numpy()


class TamisBackend(Backend):
    """`onnx.backend` for models captured by tamis."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> CapturedModel:
        """Read a model; raises what `from_proto` and `OnnxModule` raise."""
        return CapturedModel(model)

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **kwargs: Any) -> Arrays:
        """Read a model and run it once."""
        return cls.prepare(model, device).run(inputs)

    @classmethod
    def run_node(
        cls,
        node: onnx.NodeProto,
        inputs: Any,
        device: str = "CPU",
        outputs_info: Sequence[tuple[Any, tuple[int, ...]]] | None = None,
        **kwargs: Any,
    ) -> Arrays:
        """Run one node of the newest version of its domain on a list of arrays."""
        arrays = [np.asarray(value) for value in inputs]
        values = [numpy_helper.from_array(array, name) for array, name in zip(arrays, node.input, strict=True)]
        declared = [helper.make_tensor_value_info(v.name, v.data_type, list(v.dims)) for v in values]
        results = [onnx.ValueInfoProto(name=name) for name in node.output]
        graph = helper.make_graph([node], "node", declared, results)
        version = kwargs.get("opset_version", onnx.defs.onnx_opset_version())
        opsets = [helper.make_opsetid(node.domain, version)]
        return cls.run_model(helper.make_model(graph, opset_imports=opsets), arrays, device)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Only the CPU."""
        return device == "CPU"


prepare = TamisBackend.prepare
run_model = TamisBackend.run_model
run_node = TamisBackend.run_node
supports_device = TamisBackend.supports_device
