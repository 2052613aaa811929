"""Names in an ONNX file: inputs and outputs as the user's module calls them, dimensions by what they are."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..graph import Interface


def output_names(program: ExportedProgram, *, token_map: bool = False) -> list[str]:
    """A name for every output tensor: its path in the result (`last_hidden_state`), else `output_0`...

    Keys and values of layer 3 in `past_key_values` are `present.3.key` and `present.3.value`, as runtimes expect them.
    Outputs that are None have no value in the file and no name here.

    token_map  the program returns (outputs, token_map): the outputs keep the names they have without it
    """
    spec = program.call_spec.out_spec
    paths = [*_paths(_children(spec)[0]), ("token_map",)] if token_map else [*_paths(spec)]
    names = [_joined(path) for path in paths]
    names = [f"output_{name}" if re.fullmatch(r"[\d_]+", name) else name or "output_0" for name in names]
    values = program.graph.output_node().args[0][-len(names) :]  # type: ignore[index]
    return [name for name, value in zip(names, values, strict=True) if value is not None]


def _joined(path: tuple[str, ...]) -> str:
    match path:
        case ("past_key_values", layer, "0" | "1" as place):
            return f"present.{layer}.{'value' if int(place) else 'key'}"
    return "_".join(path)


def _paths(spec: pytree.TreeSpec) -> Iterator[tuple[str, ...]]:
    if spec.is_leaf():
        yield ()
        return
    children = _children(spec)
    for key, child in zip(_keys(spec, len(children)), children, strict=True):
        yield from ((key, *path) for path in _paths(child))


def _children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    return spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs


def _keys(spec: pytree.TreeSpec, count: int) -> Sequence[str]:
    """Field names where the container has them, else indices."""
    context, kind = spec.context, spec.type
    if isinstance(context, list | tuple) and len(context) and isinstance(context[0], list):
        context = context[0]  # a dataclass: its fields, and those that are None
    if isinstance(context, list | tuple) and len(context) == count and all(isinstance(one, str) for one in context):
        return list(context)
    if fields := getattr(context, "_fields", None) or getattr(kind, "_fields", None):
        return list(fields)
    if dataclasses.is_dataclass(kind) and len(dataclasses.fields(kind)) == count:
        return [one.name for one in dataclasses.fields(kind)]
    return [str(i) for i in range(count)]


def file_names(program: ExportedProgram, interface: Interface | None, *, token_map: bool = False) -> dict[str, Any]:
    """Names for `export_onnx`: those of the model's own file where it has one, else what the program calls things."""
    if interface is None:
        return {"output_names": output_names(program, token_map=token_map)}
    outputs = [*interface.outputs, *(["token_map"] if token_map else [])]
    user_inputs = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in user_inputs]
    dimensions: dict[str, str] = {}
    for node, named in zip(nodes, interface.dimensions, strict=True):
        for axis, name in named:
            size = node.meta["val"].shape[axis]
            if isinstance(size, torch.SymInt):
                dimensions[str(size)] = dimensions.get(str(size)) or name
    found = {"input_names": interface.inputs, "output_names": outputs, "dimensions": dimensions}
    return {**found, "weight_names": interface.weights, "results": interface.results}


def rename_dimensions(model: ir.Model, names: Mapping[str, str]) -> None:
    """Replace symbols by names in every shape of the model's graph, also inside expressions such as `197*s77`.

    Symbols of which nothing is said are token counts: `tokens_1`, `tokens_2`... in the order of the graph.  Where a
    name is "", dimensions that follow from it have none.
    """
    known = dict(names)
    hidden_symbols = [re.escape(one) for one in names if not names[one]]
    nameless = re.compile(rf"\b({'|'.join(hidden_symbols)})\b") if hidden_symbols else None

    def name(word: re.Match[str]) -> str:
        symbol = word[0]
        if symbol not in known and re.fullmatch(r"[su]\d+", symbol):
            known[symbol] = f"tokens_{len(known) - len(names) + 1}"
        return known.get(symbol, symbol)

    for value in _values(model.graph):
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                hidden = nameless and nameless.search(size.value)
                shown = None if hidden else re.sub(r"\b[A-Za-z_]\w*\b", name, size.value)
                value.shape[axis] = ir.SymbolicDim(shown)  # type: ignore[index]


def rename_results(model: ir.Model, results: Sequence[Sequence[tuple[int, str]]]) -> None:
    """Give dynamic dimensions of outputs, other than counts of tokens, their names in the model's own file."""
    for value, named in zip(model.graph.outputs, results, strict=False):
        for axis, name in named:
            size = value.shape[axis] if value.shape is not None and axis < len(value.shape) else None
            if isinstance(size, ir.SymbolicDim) and not re.search(r"\btokens_\d+\b", size.value or ""):
                value.shape[axis] = ir.SymbolicDim(name or None)  # type: ignore[index]


def rename_weights(model: ir.Model, names: Mapping[str, str]) -> None:
    """Give weights their names in the model's own file."""
    found = [(value, names[key]) for key, value in model.graph.initializers.items() if key in names]
    rename_values(model, [value for value, _ in found], [name for _, name in found])


def rename_values(model: ir.Model, values: Sequence[ir.Value], names: Sequence[str]) -> None:
    """Give the model's inputs or outputs their names; another value that has one of them makes way."""
    wanted = dict(zip(names, values, strict=True))
    for value in _values(model.graph):
        if value.name in wanted and value is not wanted[value.name]:
            _set_name(model, value, f"{value.name}_inner")
    for name, value in wanted.items():
        if value.name != name:
            _set_name(model, value, name)


def _set_name(model: ir.Model, value: ir.Value, name: str) -> None:
    value.name = name  # an initializer's entry in the graph follows
    if value.const_value is not None:
        value.const_value.name = name


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from list(graph.initializers.values())
    for node in graph:
        yield from node.outputs
