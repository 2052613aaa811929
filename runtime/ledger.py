"""The token ledger: tokens into and out of every layer, predicted from the count rules and measured in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ..graph import TokenGraph, module_path, op_name, source_line
from ..report import LayerRow
from ..rewrite import Outcome
from .inputs import Call, size_at, symbols_of

ATTENTION = ("scaled_dot_product_attention", "tamis.attention", "tamis.quantized_attention")


def ledger(graph: TokenGraph, outcomes: Sequence[Outcome], call: Call) -> tuple[LayerRow, ...]:
    """Tokens per layer of the stream for the lengths of this call, predicted; () without a stream.

    A count is None from the first reduction on whose rule is not known.
    """
    rows = []
    tokens = stream_length(graph, call)
    for layer in graph.layers:
        before = tokens
        for outcome in outcomes:
            if outcome.applied and outcome.layer == layer.index and not outcome.inside:
                tokens = _after(tokens, outcome)
        rows.append(LayerRow(layer.index, graph.sites[layer.site].module, before, tokens))
    return tuple(rows)


def stream_length(graph: TokenGraph, call: Call) -> int | None:
    """Tokens in the stream before any reduction, for the lengths of this call."""
    size = stream_size(graph)
    return None if size is None else size_at(size, symbols_of(graph.program, call))


def stream_size(graph: TokenGraph) -> Any:
    """Tokens in the stream before any reduction, a number or a symbol; None without a stream."""
    for layer in graph.layers:
        for where in ("before_attention", "after_attention", "after_block"):
            name = layer.cut(where)
            if name is not None:
                return graph.node(name).meta["val"].shape[1]
    return None


def with_measured(
    rows: tuple[LayerRow, ...], graph: TokenGraph, result: ExportedProgram, call: Call
) -> tuple[LayerRow, ...]:
    """The rows with the query tokens that each layer's attention saw when the result was run.

    Attention is matched by its order in the program; where a rewrite changed the number of sites nothing is filled in.
    """
    seen = attention_tokens(result, call)
    if len(seen) != len(graph.sites):
        return rows
    return tuple(replace(row, measured=seen[layer.site]) for row, layer in zip(rows, graph.layers, strict=True))


def attention_tokens(program: ExportedProgram, call: Call) -> list[int]:
    """Query tokens of every attention of the program, in order, in a run on this call."""
    seen: list[int] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and op_name(n) in ATTENTION:
                output = value[0] if isinstance(value, tuple | list) else value
                seen.append(int(output.shape[-2]))
            return value

    args, kwargs = call
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    from torch.utils import _pytree as pytree

    with torch.no_grad():
        # The interpreter takes the flat inputs: what the module's own pytree code would hand to its graph.
        Watch(module).run(*pytree.tree_leaves((args, kwargs)), enable_io_processing=False)
    return seen


def flops_per_layer(graph: TokenGraph, program: ExportedProgram, by_node: Mapping[str, int]) -> dict[int, int]:
    """FLOPs of each layer of the stream, in the captured program or a rewritten one; {} when layers cannot be told."""
    totals: dict[int, int] = {}
    for name, layer in layers_of_nodes(graph, program).items():
        totals[layer] = totals.get(layer, 0) + by_node.get(name, 0)
    return totals


def layers_of_nodes(graph: TokenGraph, program: ExportedProgram) -> dict[str, int]:
    """Layer of the stream by name of the node, in the captured program or a rewritten one; {} when they cannot be told.

    A node belongs to the layer whose module made it; in a model without modules, to that whose line (whose node of an
    ONNX file) did.  Names would not do: a rewrite numbers nodes anew.  What a rewrite added has no module of its own
    and belongs to the layer before it.
    """
    owners = {path: layer for layer, path in layer_modules(graph).items()}
    lines = {} if owners else layer_lines(graph)
    found: dict[str, int] = {}
    current: int | None = None
    for node in program.graph.nodes:
        path = module_path(node) if owners else source_line(node)
        if path:
            within = (layer for owner, layer in owners.items() if f"{path}.".startswith(f"{owner}."))
            current = next(within, None) if owners else lines.get(path)
        if current is not None:
            found[node.name] = current
    return found


def layer_modules(graph: TokenGraph) -> dict[int, str]:
    """Layer index -> path of its module: its site's path up to where the layers' paths part (`blocks.3`).

    {} when the paths are not known or do not part.
    """
    paths = {layer.index: graph.sites[layer.site].module.split(".") for layer in graph.layers}
    if len(paths) == 1:  # nothing to part from: up to the number in the path
        return {i: ".".join(p[: k + 1]) for i, p in paths.items() for k, part in enumerate(p) if part.isdigit()}
    for depth in range(1, max(map(len, paths.values()), default=0) + 1):
        owners = {index: ".".join(path[:depth]) for index, path in paths.items()}
        if len(set(owners.values())) == len(owners):
            return owners
    return {}


def layer_lines(graph: TokenGraph) -> dict[str, int]:
    """Line of the user's model -> index of the layer between whose cuts it is; {} where one line makes several."""
    names = [node.name for node in graph.graph.nodes]
    starts = [names.index(layer.before_attention) for layer in graph.layers if layer.before_attention is not None]
    if not graph.layers or len(starts) < len(graph.layers):
        return {}
    last = graph.layers[-1].after_block
    limits = [*starts[1:], len(names) if last is None else names.index(last)]
    found: dict[str, int] = {}
    for layer, start, limit in zip(graph.layers, starts, limits, strict=True):
        for node in list(graph.graph.nodes)[start + 1 : limit + 1]:
            line = source_line(node)
            if line and found.setdefault(line, layer.index) != layer.index:
                return {}
    return found


def _after(tokens: int | None, outcome: Outcome) -> int | None:
    if isinstance(outcome.after, int):
        return outcome.after
    if tokens is None or outcome.after is None:  # sparse attention takes no token out
        return tokens
    return None if outcome.rule is None else int(outcome.rule.out(tokens))
