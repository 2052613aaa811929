"""tamis ops of a program as nodes that the ONNX exporter carries over untouched, and the functions they call.

    %slot, %leader, ... = tamis.bipartite_match(%metric, None, %count, 1, [..])
        ->  onnx_symbolic._symbolic_multi_out([%metric, %count as int64], "BipartiteMatch", {prefix: 1, ..})

A count is the exception: the exporter takes no SymInt from such a node, so its function's body is traced in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from operator import add, floordiv, mul
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
import torch
from onnxscript import OnnxFunction
from onnxscript import opset18 as standard
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._sympy.functions import FloorDiv, Max, Min

from ..capture.program import copied, rebuild
from ..errors import ExportFailed
from ..op import CONTRIB, NAMESPACE, OPS, OnnxCall
from .onnx_contrib import attention_like, contrib_forms, own_form
from .onnx_rows import guard_rows
from .splice import Splicer, fake_mode_of, op_of

Functions = dict[str, OnnxFunction]


@dataclass
class Calls:
    """What the nodes made for tamis ops call.

    functions  by name
    version    of the standard operators that they need
    """

    functions: Functions = field(default_factory=dict)
    version: int = 0

    def add(self, call: OnnxCall) -> None:
        """Note one call."""
        self.version = max(self.version, call.since)
        if call.domain:
            self.functions[call.name] = call.function


def symbolic_program(program: ExportedProgram, contrib: bool = False) -> tuple[ExportedProgram, Calls]:
    """The program with symbolic ONNX nodes for its tamis ops, and what those call.

    contrib  nodes that have a form on ONNX Runtime's own operators get it
    """
    calls = Calls()
    own = {form.node.name for form in contrib_forms(program) if form.function} if contrib else set()
    module = copied(program)
    guard_rows(program, module.graph)
    splicer = Splicer(fake_mode_of(module.graph))
    for node in list(module.graph.nodes):
        op = op_of(node)
        if op is not None and op.parts is not None:
            splicer.splice(node, op.parts)
    for node in list(module.graph.nodes):
        op, form = op_of(node), own_form(node)
        if node.name in own and form is not None:
            splicer.splice(node, _caller(form, attention_like, calls))
        elif op is not None and op.name != "token_count":
            assert op.onnx is not None
            splicer.splice(node, _caller(op.onnx, op.fake, calls, op.reference))
    module.graph.eliminate_dead_code()
    module.recompile()
    return rebuild(program, module), calls


def _caller(
    form: Callable[..., Any], fake: Callable[..., Any], calls: Calls, reference: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        made = form(*args, **kwargs)
        calls.add(made)
        several, dtypes, shapes = _results(fake, reference, args, kwargs)
        outputs = torch.onnx.ops.symbolic_multi_out(
            f"{made.domain}::{made.name}",
            [_as_tensor(value) for value in made.inputs],
            made.attributes,
            dtypes=dtypes,
            shapes=shapes,
            version=1 if made.domain else None,
        )
        return tuple(outputs) if several else outputs[0]

    return call


def _results(
    fake: Callable[..., Any], reference: Callable[..., Any] | None, args: Any, kwargs: Any
) -> tuple[bool, list[torch.dtype], list[list[Any]]]:
    """Whether the op has several results, and their dtypes and shapes in terms of its arguments' sizes.

    Called while tracing.  The op's shape rule may answer with new symbols, which mean nothing outside of the call; the
    reference then gives them as expressions.
    """
    known = _known_sizes(args, kwargs)
    with disable_proxy_modes_tracing():
        results = fake(*args, **kwargs)
        if reference and not all(one in known or one.free_symbols <= known.keys() for one in _expressions(results)):
            results = reference(*args, **kwargs)
    several = isinstance(results, list | tuple)
    tensors = results if several else [results]
    return several, [one.dtype for one in tensors], [[_traced(size, known) for size in one.shape] for one in tensors]


def _known_sizes(args: Any, kwargs: Any) -> dict[Any, Any]:
    """The arguments' sizes by symbol or expression."""
    values = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor | torch.SymInt)]
    sizes = [size for one in values for size in getattr(one, "shape", (one,)) if isinstance(size, torch.SymInt)]
    return {size.node.expr: size for size in sizes}


def _expressions(results: Any) -> list[Any]:
    tensors = results if isinstance(results, list | tuple) else [results]
    return [size.node.expr for one in tensors for size in one.shape if isinstance(size, torch.SymInt)]


def _traced(size: Any, known: dict[Any, Any]) -> Any:
    """The size, in steps of STEPS from known sizes, computed so that the trace sees how."""
    if not isinstance(size, torch.SymInt):
        return size

    def value(expression: Any) -> Any:
        if expression in known or expression.is_Integer:
            return known.get(expression) if expression in known else int(expression)
        step = next(step for kind, step in STEPS.items() if isinstance(expression, kind))
        return reduce(step, map(value, expression.args))

    return value(size.node.expr)


STEPS: dict[Any, Callable[[Any, Any], Any]] = {
    sympy.Add: add,
    sympy.Mul: mul,
    FloorDiv: floordiv,
    Min: torch.sym_min,
    Max: torch.sym_max,
}


def _as_tensor(value: Any) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple):
        return torch.stack([torch.scalar_tensor(one, dtype=torch.int64) for one in value])
    return torch.scalar_tensor(value, dtype=torch.int64)


def translations() -> dict[Any, Callable[..., Any]]:
    """What the exporter does not know: token_count, by the body of its ONNX function, and stable sorting.

    TopK puts the lower index first among equals, as a stable sort does.
    """

    def stable_sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        size = standard.Gather(standard.Shape(x), standard.Constant(value_ints=[dim]))
        return standard.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    counted = OPS["token_count"].onnx
    assert counted is not None

    def count(like: Any, axis: int, prefix: int, rule: list[int]) -> Any:
        made = counted(like, axis, prefix, rule)
        inputs = [standard.Constant(value_ints=one) if isinstance(one, list) else one for one in made.inputs]
        return made.function.function(*inputs, **made.attributes)

    return {OPS["token_count"].call: count, torch.ops.aten.sort.stable: stable_sort}


def add_functions(model: ir.Model, functions: Functions) -> None:
    """Add the functions, and those they call, to the model, in the model's version of the standard operators."""
    if not functions:
        return
    model.opset_imports[NAMESPACE] = 1
    for function in _with_callees(functions):
        added = ir.serde.deserialize_function(function.to_function_proto())
        added.opset_imports[""] = model.opset_imports[""]
        if CONTRIB in added.opset_imports:
            model.opset_imports[CONTRIB] = added.opset_imports[CONTRIB]
        _plain_constants(added)
        model.functions[added.identifier()] = added


def _plain_constants(function: ir.Function) -> None:
    """Constants as tensors: onnxslim reads `value_float` as float64 and writes functions that no checker accepts."""
    types = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    for node in ir.traversal.RecursiveGraphIterator(function.graph):
        for name, dtype in types.items():
            attribute = node.attributes.get(name) if node.op_type == "Constant" else None
            if attribute is not None and not attribute.is_ref():
                value = np.array(node.attributes.pop(name).value, dtype=dtype)
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(value))


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
        if name.rstrip("_") in ("aten::scatter_reduce", "aten::index_reduce") and "mean" in (
            *node.args,
            *node.kwargs.values(),
        ):
            reason = f"node {node.name} ({name}) scatters with reduction 'mean', which ONNX does not have"
            raise ExportFailed(
                path=path, kind="ONNX", reason=reason, hint="scatter the sum and the count, then divide."
            )
