"""tamis ops of a program as nodes that the ONNX exporter carries over untouched, and the functions they call.

    %slot, %leader, ... = tamis.bipartite_match(%metric, None, %count, 1, [..])
        ->  onnx_symbolic._symbolic_multi_out([%metric, %count as int64], "BipartiteMatch", {prefix: 1, ..})

A count is the exception: the exporter takes no SymInt from such a node, so its function's body is traced in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import OnnxFunction
from onnxscript import opset18 as standard
from torch import Tensor, fx
from torch.export import ExportedProgram

from ..capture.program import copied, rebuild
from ..errors import ExportFailed
from ..op import NAMESPACE, OPS, Op
from .splice import fake_mode_of, op_of, splice

Functions = dict[str, OnnxFunction]


def symbolic_program(program: ExportedProgram) -> tuple[ExportedProgram, Functions]:
    """The program with symbolic ONNX nodes for its tamis ops, and the functions those call, by name."""
    functions: Functions = {}
    module = copied(program)
    mode = fake_mode_of(module.graph)
    for node in list(module.graph.nodes):
        op = op_of(node)
        if op is not None and op.name != "token_count":
            splice(node, _caller(op, functions), mode)
    module.graph.eliminate_dead_code()
    module.recompile()
    return rebuild(program, module), functions


def _caller(op: Op, functions: Functions) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        made = op.onnx(*args, **kwargs)
        functions[made.function.name] = made.function
        results = op.fake(*args, **kwargs)
        several = isinstance(results, list | tuple)
        outputs = torch.onnx.ops.symbolic_multi_out(
            f"{NAMESPACE}::{made.function.name}",
            [_as_tensor(value) for value in made.inputs],
            made.attributes,
            dtypes=[one.dtype for one in (results if several else [results])],
            shapes=[one.shape for one in (results if several else [results])],
            version=1,
        )
        return tuple(outputs) if several else outputs[0]

    return call


def _as_tensor(value: Any) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple):
        return torch.stack([torch.scalar_tensor(one, dtype=torch.int64) for one in value])
    return torch.scalar_tensor(value, dtype=torch.int64)


def count_translation() -> dict[Any, Callable[..., Any]]:
    """How the exporter translates token_count: the body of its ONNX function, in place."""

    def translate(like: Any, axis: int, prefix: int, rule: list[int]) -> Any:
        made = OPS["token_count"].onnx(like, axis, prefix, rule)
        inputs = [standard.Constant(value_ints=one) if isinstance(one, list) else one for one in made.inputs]
        return made.function.function(*inputs, **made.attributes)

    return {OPS["token_count"].call: translate}


def add_functions(model: ir.Model, functions: Functions) -> None:
    """Add the functions, and those they call, to the model, in the model's version of the standard operators."""
    if not functions:
        return
    model.opset_imports[NAMESPACE] = 1
    for function in _with_callees(functions):
        added = ir.serde.deserialize_function(function.to_function_proto())
        added.opset_imports[""] = model.opset_imports[""]
        model.functions[added.identifier()] = added


def _with_callees(functions: Functions) -> list[OnnxFunction]:
    found: Functions = {}
    for function in functions.values():
        found.update({one.name: one for one in function.function_ir.get_called_functions().values()})
        found[function.name] = function
    return list(found.values())


def refuse_mean_scatter(graph: fx.Graph, path: str) -> None:
    """Raise ExportFailed for a scatter that averages: the exporter translates it to one that overwrites."""
    for node in graph.nodes:
        name = str(getattr(node.target, "_schema", None) and node.target._schema.name)
        if name.rstrip("_") in ("aten::scatter_reduce", "aten::index_reduce") and "mean" in (*node.args, *node.kwargs.values()):
            reason = f"node {node.name} ({name}) scatters with reduction 'mean', which ONNX does not have"
            raise ExportFailed(path=path, kind="ONNX", reason=reason, hint="scatter the sum and the count, then divide.")
