"""The rewrite of all token reductions: one re-execution in which methods run at their cuts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from ..capture.program import rebuild
from ..graph import Layer, TokenGraph
from ..kernels.symbols import symbolic_counts
from ..rewrite import Options, Outcome, Result
from .interpreter import ReductionInterpreter
from .layer_choice import able
from .outputs import with_token_map
from .reduction import TokenReduction
from .retrace import retrace
from .trained import with_trained

Placed = dict[str, list[tuple[Layer, TokenReduction]]]


def reduce_tokens_of(graph: TokenGraph, methods: Sequence[TokenReduction], options: Options) -> Result:
    """Splice the methods in at their cuts and carry the smaller token count through the rest of the graph."""
    outcomes: list[Outcome] = []
    placed = _place(graph, methods, outcomes)
    if not placed and not options.token_map:
        return Result(graph, tuple(outcomes))
    extended, weights = with_trained(
        graph, [(node, method) for node, at in placed.items() for _, method in at], len(graph.layers)
    )
    interpreter = ReductionInterpreter(extended, placed, options, weights)
    with symbolic_counts() if options.symbolic_counts else nullcontext():
        module = retrace(extended.program, interpreter.run_all)
    outcomes += interpreter.outcomes
    outcomes.sort(key=lambda o: -1 if o.layer is None else o.layer)
    if not any(o.applied for o in interpreter.outcomes) and not options.token_map:
        return Result(graph, tuple(outcomes))
    spec = with_token_map(graph.program) if options.token_map else None
    program = rebuild(extended.program, module, out_spec=spec)
    return Result(graph.with_program(program), tuple(outcomes))


def _place(graph: TokenGraph, methods: Sequence[TokenReduction], outcomes: list[Outcome]) -> Placed:
    """Which methods run at which node; layers without the place they need are skipped with the reason."""
    placed: Placed = {}
    for method in able(graph, methods, outcomes):
        for index in method.selected(len(graph.layers)):
            layer = graph.layers[index]
            node = place_in(layer, method.where)
            if node is None:
                why = "; ".join(layer.notes) or f"no place {method.where.replace('_', ' ')}"
                outcomes.append(Outcome(str(method), index, graph.sites[layer.site].node, False, why))
            elif method.rule(index, len(graph.layers), graph.prefix).is_identity and not method.always:
                why = "nothing to remove here (r=0 or keep_ratio=1)"
                outcomes.append(Outcome(str(method), index, graph.sites[layer.site].node, False, why))
            else:
                placed.setdefault(node, []).append((layer, method))
    return placed


def place_in(layer: Layer, where: str) -> str | None:
    """The node of a layer at which a method runs; a method for after attention moves behind a parallel block."""
    return layer.cut(where) or (layer.after_block if where == "after_attention" else None)
