"""`tamis.attention_recall`: how much of a model's attention sparse attention passes would read, on inputs of yours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..attention_index import Heads
from ..errors import BadParameter, NothingChanged
from ..graph import TokenGraph
from ..passes.index_pairs import Held, held
from ..passes.sparse import SparseAttention
from ..passes.sparse_recall import LayerHeads
from ..passes.sparse_rewrite import Placed, place
from ..rewrite import Outcome, Pipeline
from .inputs import Call, graph_inputs

SHARING = ("layer", "kv")


@dataclass(frozen=True)
class LayerRecall:
    """One layer under one pass; numbers are per query head.

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
        rows = [("layer", "density", "recall", "lowest head", "not shared", "pass")]
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
        NothingChanged: no layer takes the passes.
        BadParameter: a pass is no sparse attention.
        TamisError: as `tamis.compile` for models and inputs.

    A pass that has an attention of its own and no index is left out with the reason.
    """
    graph, call, own = _captured(model, args, kwargs)
    return recalls(graph, call, [Pipeline.parse(own if passes is None else passes)], after)[0]


def recalls(graph: TokenGraph, call: Call, pipelines: Sequence[Pipeline], after: int = 0) -> list[AttentionRecall]:
    """`attention_recall` of several pipelines in one run of a captured model."""
    outcomes: list[list[Outcome]] = [[] for _ in pipelines]
    placed = [_placed(graph, pipeline, out) for pipeline, out in zip(pipelines, outcomes, strict=True)]
    wanted = sorted({layer.index for one in placed for layer, _ in one.values()})
    rows: list[list[LayerRecall]] = [[] for _ in pipelines]
    for layer, heads in LayerHeads(graph, wanted)(graph_inputs(graph.program, call)):
        site = graph.sites[layer.site].node
        for one, found in zip(placed, rows, strict=True):
            if site in one:
                found.append(_row(one[site][1], layer.index, heads, after))
    return [
        AttentionRecall(str(pipeline), tuple(found), _skipped(out), after)
        for pipeline, found, out in zip(pipelines, rows, outcomes, strict=True)
    ]


def _captured(model: Any, args: Any, kwargs: Mapping[str, Any] | None) -> tuple[TokenGraph, Call, Any]:
    """The original, the inputs, and the passes a compiled model was made with."""
    from .api import prepare
    from .compiled import CompiledModel
    from .inputs import Inputs

    args = args if isinstance(args, tuple | list) else (args,)
    if isinstance(model, CompiledModel):
        graph = model._original("attention_recall")
        call = Inputs.of(graph.program).bind(tuple(args), kwargs or {}) if args or kwargs else model.example_call
        return graph, call, model.recipe.passes
    if isinstance(model, TokenGraph):
        return model, Inputs.of(model.program).bind(tuple(args), kwargs or {}), ()
    prepared = prepare(model, tuple(args), kwargs)
    return prepared.graph, prepared.call, ()


def _placed(graph: TokenGraph, pipeline: Pipeline, outcomes: list[Outcome]) -> Placed:
    for one in pipeline.passes:
        if not isinstance(one, SparseAttention):
            hint = "only sparse attention leaves tokens where they are."
            raise BadParameter(
                where="attention_recall", name="passes", rule="sparse attention", got=repr(str(one)), hint=hint
            )
    placed = place(graph, [one for one in pipeline.passes if isinstance(one, SparseAttention)], outcomes)
    for site, (layer, method) in list(placed.items()):
        if not method.indexed:
            del placed[site]
            reason = "it reads more than keys of the prompt, of which no part of attention can be said"
            outcomes.append(Outcome(str(method), layer.index, site, False, reason))
    if not placed:
        reasons = "\n".join(dict.fromkeys(f"  {one.reason}" for one in outcomes)) or "  no pass was given"
        raise NothingChanged(passes=str(pipeline) or "attention_recall", reasons=reasons)
    return placed


@torch.no_grad()
def _row(method: SparseAttention, layer: int, heads: Heads, after: int) -> LayerRecall:
    shares = getattr(method, "share", None) in SHARING
    asked = [method, replace(method, share="query")] if shares else [method]  # type: ignore[call-arg]
    first, *alone = held(heads, [one.index(heads) for one in asked], after)
    return _said(method, layer, first, alone[0] if alone else None)


def _said(method: SparseAttention, layer: int, found: Held, alone: Held | None) -> LayerRecall:
    own = None if alone is None else tuple(alone.recall)
    return LayerRecall(layer, str(method), tuple(found.recall), tuple(found.density), own)


def _skipped(outcomes: Sequence[Outcome]) -> dict[int, str]:
    return {one.layer: one.reason for one in outcomes if one.layer is not None and not one.applied}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 1.0
