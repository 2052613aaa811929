"""`inline_ops`: a program without tamis ops, each replaced by its reference as ATen.

No Python op may reach AOTInductor, which refuses them.  `torch.compile` calls them, which is what CALLED is for.

    %count = tamis.token_count(%x, 1, 1, [0, 0, 13, 1])      ->  %n = sym_size(%x, 1); %count = n - ... (plain integers)
    %out = tamis.reduce_tokens(%x, %slot, %leader, ...)      ->  the nodes its reference traces to
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ..capture.program import copied, rebuild
from ..counts import CountRule
from ..op import all_arguments
from .splice import Splicer, fake_mode_of, op_of

# Ops that `torch.compile` on a CPU calls rather than compiles.  They sort, gather and scatter a few rows, which takes
# longer to compile than the rest of the model and gains nothing (docs/performance.md).
CALLED = frozenset(
    {
        "attention_rows",
        "bipartite_match",
        "block_sparse_attention",
        "block_sparse_attention_with_lse",
        "block_sparse_received",
        "join_nearest",
        "merge_tokens",
        "order_slots",
        "pick_tiles",
        "reduce_tokens",
        "rescale_tokens",
        "restore_tokens",
        "sample_tokens",
        "select_tokens",
        "slash_tiles",
        "valid_slots",
        "weighted_match",
    }
)


def inline_ops(program: ExportedProgram, *, counts: bool = True, called: Collection[str] = ()) -> ExportedProgram:
    """The same program with every tamis op replaced by its reference and dead nodes removed.

    Attention, linear, layer-norm and GELU nodes, names, signature, weights and stack traces are kept; the given
    program is not changed, and is returned as it is when it holds no tamis op.

    counts  whether token_count nodes are replaced too, by integer arithmetic
    called  names of ops that stay
    """
    if not any(op_of(node) for node in program.graph.nodes):
        return program
    module = copied(program)
    kept = {*called, *(() if counts else ("token_count",))}
    inline_nodes(module.graph, kept)
    module.graph.eliminate_dead_code()
    left = {op.name for node in module.graph.nodes if (op := op_of(node))}
    assert left <= kept
    module.recompile()
    return rebuild(program, module)


def inline_nodes(graph: fx.Graph, kept: Collection[str]) -> None:
    """Replace the tamis nodes of a graph, in place, but for ops of these names."""
    splicer = Splicer(fake_mode_of(graph))
    for node in list(graph.nodes):
        op = op_of(node)
        if op is None or op.name in kept:
            continue
        if op.name == "token_count":
            _inline_count(node, splicer)
        else:
            splicer.splice(node, op.reference)


def place_compiled(graph: fx.Graph) -> bool:
    """Let nodes of ops with a form for `torch.compile` on a CPU call that form, in place: Python, traced once more.

    Answers whether there were any.  Such a form may be a region that is compiled once, which takes no two views of one
    tensor, and hold a kernel whose template reads no views: they are copied.
    """
    placed = False
    for node in graph.nodes:
        op = op_of(node)
        if op is None or op.compiled_on_cpu is None:
            continue
        form = op.compiled_on_cpu(*all_arguments(node.target, node.args, node.kwargs))
        if form is None:
            continue
        placed = True
        for given in dict.fromkeys(node.all_input_nodes):
            if _viewed(given) is not given:
                with graph.inserting_before(node):
                    copy = graph.call_function(torch.ops.aten.clone.default, (given,))
                node.replace_input_with(given, copy)
        node.target = form
    return placed


def _viewed(node: fx.Node) -> fx.Node:
    """The node whose tensor this one's may share memory with."""
    while node.op == "call_function" and node.all_input_nodes:
        schema = getattr(node.target, "_schema", None)
        shares = schema is not None and any(one.alias_info is not None for one in schema.returns)
        if not (shares or node.target in (operator.getitem, torch.ops.aten.dropout.default)):
            break
        node = node.all_input_nodes[0]
    return node


def _inline_count(node: fx.Node, splicer: Splicer) -> None:
    """Integer arithmetic whose result keeps the symbol the count had: expressions of counts must not nest."""
    kept = {key: node.meta[key] for key in ("val", "unbacked_bindings") if key in node.meta}
    result = splicer.splice(node, count)
    if isinstance(result, fx.Node):
        result.meta.update(kept)


def count(like: Any, axis: int, prefix: int, rule: list[int]) -> Any:
    """The tokens that `token_count` counts, on an int or a SymInt."""
    return CountRule.from_flat(prefix, list(rule)).out(like.shape[axis])
