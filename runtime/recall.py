"""`tamis.attention_recall`: how much of a model's attention sparse attention passes would read, on inputs of yours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..attention_index import Heads
from ..error_text import first_line
from ..errors import BadParameter, InputMismatch
from ..graph import Layer, TokenGraph
from ..parameters import check_whole, keywords
from ..passes.index_pairs import held
from ..passes.sparse import SparseAttention
from ..passes.sparse_recall import LayerHeads
from ..passes.sparse_rewrite import Part, Placed, place
from ..rewrite import Outcome, Pipeline
from ..sparse_errors import NothingToMeasure
from .inputs import Call, graph_inputs, misfit

SHARING = ("layer", "kv")


@dataclass(frozen=True)
class LayerRecall:
    """One layer; numbers are per query head, 1 for heads that stay dense.

    method   the pass, or all of them with their heads
    recall   mean over queries of the dense attention on the keys that are read, of 1
    density  pairs read over pairs that dense attention reads
    alone    recall when every query head has its own choice; None where heads share none
    """

    layer: int
    method: str
    recall: tuple[float, ...]
    density: tuple[float, ...]
    alone: tuple[float, ...] | None = None


@dataclass(frozen=True)
class AttentionRecall:
    """What passes would read of a model's attention; `print` it: a line per layer.

    layers   those that a pass takes, in order
    skipped  why others are left out, by layer
    after    queries before this place are not counted
    """

    passes: str
    layers: tuple[LayerRecall, ...]
    skipped: dict[int, str] = field(default_factory=dict)
    after: int = 0

    @property
    def recall(self) -> float:
        """Mean over layers and heads."""
        return _mean([one for layer in self.layers for one in layer.recall])

    @property
    def density(self) -> float:
        """Mean over layers and heads."""
        return _mean([one for layer in self.layers for one in layer.density])

    @property
    def alone(self) -> float | None:
        """Mean recall when no head shares a choice; None where none does."""
        if all(layer.alone is None for layer in self.layers):
            return None
        return _mean([one for layer in self.layers for one in layer.alone or layer.recall])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "recall": self.recall, "density": self.density, "alone": self.alone}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "density", "recall", "lowest head", "not shared", "pass")]
        for one in self.layers:
            alone = "" if one.alone is None else f"{_mean(one.alone):.4f}"
            means = f"{_mean(one.density):.4f}", f"{_mean(one.recall):.4f}", f"{min(one.recall):.4f}"
            rows.append((str(one.layer), *means, alone, one.method))
        if self.alone is None:
            rows = [(*row[:4], row[5]) for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]])
            for row in rows
        ]
        lines = [f"{self.passes}: recall {self.recall:.4f} at density {self.density:.4f}", *lines]
        return "\n".join([*lines, *(f"layer {layer} left out: {why}" for layer, why in self.skipped.items())])


def attention_recall(
    model: Any, args: Any = (), *, kwargs: Mapping[str, Any] | None = None, passes: Any = None, after: int = 0
) -> AttentionRecall:
    """How much of the original's attention the keys that sparse attention reads would have had.

    The original runs; every layer's queries and keys are those it has without any pass, so a layer's number does not
    depend on what was lost before.  Logits and weights are float32, held for a few queries at a time.

    Args:
        model: as for `tamis.compile`; or a `CompiledModel` or `TokenGraph`, which is not captured again.
        args: inputs, positional; a `CompiledModel`'s example inputs where there are none.
        kwargs: inputs by keyword.
        passes: sparse attention passes; those of a `CompiledModel` when None.
        after: queries at places before this one are not counted: with few keys to read, sparse attention is dense.

    Raises:
        NothingToMeasure: no layer takes the passes.
        BadParameter: a pass is no sparse attention, none was given, or no query is left after `after`.
        TamisError: as `tamis.compile` for models and inputs.

    A pass that has an attention of its own and no index is left out with the reason.
    """
    check_whole("attention_recall", 0, after=after)
    graph, call, own = captured_for("attention_recall", model, args, kwargs)
    return recalls(graph, call, [Pipeline.parse(own if passes is None else passes)], after)[0]


def recalls(graph: TokenGraph, call: Call, pipelines: Sequence[Pipeline], after: int = 0) -> list[AttentionRecall]:
    """`attention_recall` of several pipelines in one run of a captured model."""
    outcomes: list[list[Outcome]] = [[] for _ in pipelines]
    placed = [
        placed_for("attention_recall", graph, pipeline, out) for pipeline, out in zip(pipelines, outcomes, strict=True)
    ]
    wanted = sorted({layer.index for each in placed for layer, _ in each.values()})
    rows: list[list[LayerRecall]] = [[] for _ in pipelines]
    for layer, heads in heads_of("attention_recall", graph, call, wanted):
        if after >= heads.tokens:
            rule, hint = f"less than the {heads.tokens} tokens there are", "no query would be counted."
            raise BadParameter(where="attention_recall", name="after", rule=rule, got=after, hint=hint)
        site = graph.sites[layer.site].node
        for one, found in zip(placed, rows, strict=True):
            if site in one:
                found.append(_row(one[site][1], layer.index, heads, after))
    return [
        AttentionRecall(str(pipeline), tuple(found), _skipped(out), after)
        for pipeline, found, out in zip(pipelines, rows, outcomes, strict=True)
    ]


def captured_for(what: str, model: Any, args: Any, kwargs: Mapping[str, Any] | None) -> tuple[TokenGraph, Call, Any]:
    """The original, the inputs, and the passes a compiled model was made with."""
    from .api import prepare
    from .compiled import CompiledModel
    from .inputs import Inputs

    given = keywords(what, kwargs)
    args = args if isinstance(args, tuple | list) else (args,)
    if isinstance(model, CompiledModel):
        graph = model._original(what)
        call = Inputs.of(graph.program).bind(tuple(args), given) if args or given else model.example_call
        return graph, call, model.recipe.passes
    if isinstance(model, TokenGraph):
        return model, Inputs.of(model.program).bind(tuple(args), given), ()
    prepared = prepare(model, tuple(args), given)
    return prepared.graph, prepared.call, ()


def heads_of(what: str, graph: TokenGraph, call: Call, layers: Sequence[int]) -> Iterator[tuple[Layer, Heads]]:
    """The heads of some layers, as the original has them; raises InputMismatch for inputs that it cannot take."""
    where = f"{what}: {graph.name}"
    check_fits(where, graph, call)
    running = LayerHeads(graph, layers)(graph_inputs(graph.program, call))
    while True:
        try:
            layer, heads = next(running)
        except StopIteration:
            return
        except (IndexError, RuntimeError) as error:
            rule, got = "the original model must run on these inputs", f"{type(error).__name__}: {first_line(error)}"
            hint = "check token ids against the vocabulary, and sizes against what the model takes."
            raise InputMismatch(where=where, rule=rule, got=got, hint=hint) from error
        yield layer, heads


def check_fits(where: str, graph: TokenGraph, call: Call) -> None:
    """Raise InputMismatch for inputs of other types, ranks or fixed sizes than the graph's."""
    if found := misfit(graph.program, call):
        rule, hint = "inputs must be as the example's, batch and length apart", "convert them, or capture with these."
        raise InputMismatch(where=where, rule=rule, got=found, hint=hint)


def placed_for(what: str, graph: TokenGraph, pipeline: Pipeline, outcomes: list[Outcome]) -> Placed:
    """Which passes have which layers, of those with an index; raises BadParameter and NothingToMeasure."""
    if not pipeline.passes:
        hint = 'for example "block-sparse:density=0.25".'
        raise BadParameter(where=what, name="passes", rule="given", got="none", hint=hint)
    for one in pipeline.passes:
        if not isinstance(one, SparseAttention):
            hint = "only sparse attention leaves tokens where they are."
            raise BadParameter(where=what, name="passes", rule="sparse attention", got=repr(str(one)), hint=hint)
    placed = place(graph, [one for one in pipeline.passes if isinstance(one, SparseAttention)], outcomes)
    for site, (layer, parts) in list(placed.items()):
        if odd := next((part for part in parts if not part.method.indexed), None):
            del placed[site]
            reason = "it reads more than keys of the prompt, of which no part of attention can be said"
            outcomes.append(Outcome(str(odd.method), layer.index, site, False, reason))
    if not placed:
        reasons = "\n".join(dict.fromkeys(f"  {one.reason}" for one in outcomes))
        raise NothingToMeasure(where=what, passes=str(pipeline), reasons=reasons)
    return placed


@torch.no_grad()
def _row(parts: Sequence[Part], layer: int, heads: Heads, after: int) -> LayerRecall:
    many = heads.queries.shape[1]
    recall, density, alone = ([1.0] * many for _ in range(3))
    shared = False
    for part in parts:
        method, some = part.method, heads.of(part.heads)
        shares = getattr(method, "share", None) in SHARING
        asked = [method, replace(method, share="query")] if shares else [method]  # type: ignore[call-arg]
        first, *own = held(some, [one.index(some) for one in asked], after)
        shared |= shares
        for values, found in ((recall, first.recall), (density, first.density), (alone, [*own, first][0].recall)):
            for head, value in zip(part.heads, found, strict=True):
                values[head] = value
    return LayerRecall(layer, _named(parts, many), tuple(recall), tuple(density), tuple(alone) if shared else None)


def _named(parts: Sequence[Part], many: int) -> str:
    """`a-shape:local=64`, or `a-shape:local=64 at heads 0, 2; block-sparse at heads 1; dense at heads 3`."""
    if [part.heads for part in parts] == [tuple(range(many))]:
        return str(parts[0].method)
    names = [(str(replace(part.method, heads=None, layers=None)), part.heads) for part in parts]
    rest = tuple(sorted(set(range(many)).difference(*(heads for _, heads in names))))
    names += [("dense", rest)] if rest else []
    return "; ".join(f"{name} at heads {', '.join(map(str, heads))}" for name, heads in names)


def _skipped(outcomes: Sequence[Outcome]) -> dict[int, str]:
    return {one.layer: one.reason for one in outcomes if one.layer is not None and not one.applied}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 1.0
