"""`rebuild`: the one place that makes an `ExportedProgram` out of a changed graph."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export import graph_signature as gs
from torch.utils import _pytree as pytree


def rebuild(
    program: ExportedProgram,
    graph_module: fx.GraphModule,
    *,
    output_names: Sequence[str] | None = None,
    out_spec: pytree.TreeSpec | None = None,
) -> ExportedProgram:
    """A program that computes `graph_module` and shares everything else with `program`.

    Args:
        program: where weights, constants, example inputs and the signature come from; it is not changed.
        graph_module: the new graph, lifted as an exported one is.  Its placeholders have the names and the order of
            the program's; its outputs are the program's in their order, further user outputs may follow.  The graph
            belongs to the result afterwards.
        output_names: names of the output nodes; read from the output node when None.  A place of a constant output
            is ignored.
        out_spec: how user outputs are packed for the caller; needed when outputs were added, else the program's.

    Raises:
        ValueError: placeholders differ, outputs were removed, or outputs were added without `out_spec`.
        torch._export.verifier.SpecViolationError: the graph is not a valid program.

    """
    signature = gs.ExportGraphSignature(
        input_specs=_input_specs(program, graph_module.graph),
        output_specs=_output_specs(program, graph_module.graph, output_names, out_spec),
    )
    ranges = _ranges(program, graph_module.graph)
    return _construct(program, graph_module, signature, ranges, _calls(program, out_spec))


def with_buffers(program: ExportedProgram, tensors: Mapping[str, Tensor]) -> tuple[ExportedProgram, dict[str, str]]:
    """A program with further buffers, where its weights are, that no node reads yet; and their nodes' names by theirs.

    Raises:
        ValueError: the program has a weight of such a name.

    """
    if taken := program.state_dict.keys() & tensors.keys():
        raise ValueError(f"weights of these names are there already: {', '.join(sorted(taken))}")
    module, signature = copied(program), program.graph_signature
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    mode: Any = detect_fake_mode([node.meta["val"] for node in placeholders])
    device = next((value.device for value in program.state_dict.values()), torch.device("cpu"))
    state, specs, names = dict(program.state_dict), [], {}
    with module.graph.inserting_before(placeholders[0]):
        for name, tensor in tensors.items():
            state[name] = tensor.to(device)
            node = module.graph.placeholder(f"b_{re.sub(r'[^0-9A-Za-z_]', '_', name)}")
            node.target = node.name
            node.meta["val"] = mode.from_tensor(state[name], static_shapes=True)
            specs.append(gs.InputSpec(gs.InputKind.BUFFER, gs.TensorArgument(node.name), name, persistent=True))
            names[name] = node.name
    inputs = [*specs, *(copy.copy(spec) for spec in signature.input_specs)]
    outputs = [copy.copy(spec) for spec in signature.output_specs]
    signature = gs.ExportGraphSignature(input_specs=inputs, output_specs=outputs)
    calls = copy.deepcopy(program.module_call_graph)
    return _construct(program, module, signature, program.range_constraints, calls, state), names


def with_ranges(program: ExportedProgram, ranges: dict[Any, Any]) -> ExportedProgram:
    """The same program with other range constraints (symbol -> ValueRanges); graph and weights are shared."""
    return _construct(program, program.graph_module, program.graph_signature, ranges, program.module_call_graph)


def _construct(
    program: ExportedProgram, graph_module: fx.GraphModule, signature: Any, ranges: Any, calls: Any, state: Any = None
) -> ExportedProgram:
    return ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=signature,
        state_dict=program.state_dict if state is None else state,
        range_constraints=ranges,
        module_call_graph=calls,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def copied(program: ExportedProgram) -> fx.GraphModule:
    """A copy of the program's graph module that may be changed: nodes are new, tensors and submodules are shared."""
    graph = fx.Graph()
    output = graph.graph_copy(program.graph, val_map := {}, return_output_node=True)  # type: ignore[var-annotated]
    assert output is not None
    value, original = output
    graph.output(value).meta.update(original.meta)
    for old, new in val_map.items():
        new.meta = copy.copy(old.meta)
        new.name = old.name  # copying avoids names of builtins, such as `input`, that export itself gives
    result = fx.GraphModule(program.graph_module, graph)
    result.meta.update(program.graph_module.meta)
    return result


def _input_specs(program: ExportedProgram, graph: fx.Graph) -> list[gs.InputSpec]:
    specs = program.graph_signature.input_specs
    expected = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    got = [node.name for node in graph.nodes if node.op == "placeholder"]
    if got != expected:
        odd = next((pair for pair in zip(got, expected, strict=False) if pair[0] != pair[1]), (len(got), len(expected)))
        raise ValueError(f"placeholders must keep their names and order: got {odd[0]}, expected {odd[1]}")
    return [copy.copy(spec) for spec in specs]


def _output_specs(
    program: ExportedProgram, graph: fx.Graph, names: Sequence[str] | None, out_spec: pytree.TreeSpec | None
) -> list[gs.OutputSpec]:
    values = list(graph.output_node().args[0])  # type: ignore[arg-type]
    before = program.graph_signature.output_specs
    if len(values) < len(before):
        raise ValueError(f"the graph has {len(values)} outputs, the program {len(before)}: outputs cannot be removed")
    if len(values) > len(before) and out_spec is None:
        raise ValueError(f"{len(values) - len(before)} outputs were added: out_spec must say how they are packed")
    names = names or [getattr(value, "name", "") for value in values]
    kinds = [(spec.kind, spec.target) for spec in before]
    kinds += [(gs.OutputKind.USER_OUTPUT, None)] * (len(values) - len(before))
    return [
        gs.OutputSpec(kind, _argument(value, name), target)
        for (kind, target), value, name in zip(kinds, values, names, strict=True)
    ]


def _argument(value: Any, name: str) -> Any:
    if not isinstance(value, fx.Node):
        return gs.ConstantArgument(name="", value=value)
    match value.meta.get("val"):
        case bool() | torch.SymBool():
            return gs.SymBoolArgument(name)
        case int() | torch.SymInt():
            return gs.SymIntArgument(name)
        case float() | torch.SymFloat():
            return gs.SymFloatArgument(name)
        case _:
            return gs.TensorArgument(name)


def _ranges(program: ExportedProgram, graph: fx.Graph) -> dict[Any, Any]:
    """The program's constraints and the ranges of symbols that only the new graph has (token counts)."""
    ranges = dict(program.range_constraints)
    known = _symbol_ranges(graph)
    for symbol in sorted(_symbols(graph), key=str):  # their order is written to files
        if symbol not in ranges and symbol in known:
            ranges[symbol] = known[symbol]
    return ranges


def _symbols(graph: fx.Graph) -> set[Any]:
    found: set[Any] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        for one in value if isinstance(value, list | tuple) else (value,):
            for size in getattr(one, "shape", (one,)):
                if isinstance(size, torch.SymInt):
                    found |= size.node.expr.free_symbols
    return found


def _symbol_ranges(graph: fx.Graph) -> dict[Any, Any]:
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return getattr(mode.shape_env, "var_to_range", {})
    return {}


def _calls(program: ExportedProgram, out_spec: pytree.TreeSpec | None) -> list[Any]:
    calls = copy.deepcopy(program.module_call_graph)
    if out_spec is not None:
        calls[0].signature.out_spec = out_spec
    return calls
