"""`tamis.calibrate`: which sparse pattern suits which head, found on prompts of yours.

Source: the offline search of Jiang et al., "MInference 1.0", NeurIPS 2024, arXiv 2407.02490, section 3.2 (methods, llm
1.4).  Differs: what each pattern costs is measured on the same prompts, early queries are left out by a rule and not
from place 2500 on, heads that no pattern suits stay dense, and what won is what is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..attention_index import Heads
from ..error_text import brief
from ..errors import BadParameter
from ..graph import TokenGraph
from ..parameters import check_whole
from ..passes.index_pairs import Held, held
from ..passes.methods.minference import patterns_of
from ..passes.sparse import SparseAttention
from ..passes.sparse_candidates import SHORTEST, candidates
from ..recipe_errors import NoPatternFound, TooShortToCalibrate
from ..rewrite import Outcome, Pipeline
from .data import prompts_of
from .inputs import Call, mask_of
from .ledger import stream_length
from .recall import SHARING, captured_for, check_fits, heads_of, placed_for

SLACK = 1.01  # by how much a cost may be over the budget, being a mean over some queries


@dataclass(frozen=True)
class HeadPattern:
    """What was chosen for one query head.

    method  the pass as text, or "dense"
    recall  part of its attention that is read, over the queries that count; 1 where it stays dense
    cost    pairs read over causal pairs, and what choosing takes, of dense attention's operations; 1 where dense
    best    the recall of the best pattern within the budget; 0 where none is within it
    alone   recall of `method` if every head chose for itself; None where no choice is shared
    """

    layer: int
    head: int
    method: str
    recall: float
    cost: float
    best: float
    alone: float | None = None


@dataclass(frozen=True)
class Calibration:
    """Patterns per head; `passes` are for `tamis.compile`, `print` it for a line per layer.

    tokens   of the longest prompt;  prompts: how many there were
    """

    passes: tuple[SparseAttention, ...]
    heads: tuple[HeadPattern, ...]
    budget: float
    least: float
    tokens: int
    prompts: int

    def patterns(self) -> list[dict[str, list[Any]]]:
        """What a file of MInference's holds: by layer and head, kind, two numbers and recall.

        Tiles are numbers there and not a density; heads with such a pattern are left out, as dense ones are.
        """
        return patterns_of(self.passes, {(one.layer, one.head): one.recall for one in self.heads})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(replace(self, passes=())), "passes": list(map(str, self.passes))}

    def lines(self) -> list[str]:
        """What was chosen, a line per layer."""
        found = []
        for layer in sorted({one.layer for one in self.heads}):
            own = [one for one in self.heads if one.layer == layer]
            by_method: dict[str, list[int]] = {}
            for one in own:
                by_method.setdefault(one.method, []).append(one.head)
            chosen = "; ".join(f"{name} at heads {', '.join(map(str, at))}" for name, at in by_method.items())
            found.append(f"layer {layer}: recall {_mean(own, 'recall'):.4f}, cost {_mean(own, 'cost'):.4f}: {chosen}")
        return found

    def headline(self) -> str:
        """How it was found and what it comes to."""
        dense = sum(one.method == "dense" for one in self.heads)
        shared = [one for one in self.heads if one.alone is not None]
        lost = f"; sharing choices costs {_mean(shared, 'alone') - _mean(shared, 'recall'):.4f}" if shared else ""
        many = f"{self.prompts} prompt{'' if self.prompts == 1 else 's'}"
        return (
            f"calibrated on {many} of up to {self.tokens} tokens, within {self.budget:g} of dense "
            f"attention: recall {_mean(self.heads, 'recall'):.4f} at cost {_mean(self.heads, 'cost'):.4f}; {dense} of "
            f"{len(self.heads)} heads stay dense, those below recall {self.least:g}{lost}"
        )

    def __str__(self) -> str:
        return "\n".join([self.headline(), *self.lines()])


def calibrate(
    model: Any,
    args: Any = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    data: str | os.PathLike[str] | Iterable[Any] | None = None,
    patterns: Any = None,
    budget: float = 0.25,
    least: float = 0.9,
    share: str | None = None,
    every: int = 1,
) -> Calibration:
    """Give every query head the pattern with the largest recall among those within a budget.

    The original runs on the prompts; recall and cost are measured per head on its own queries and keys, all prompts
    weighing as much as they have queries.  Queries that see fewer keys than half the budget allows on average are left
    out of the recall: they lose nothing under any pattern.  Ties: the cheaper, then the earlier pattern.  Patterns are
    for prompts of about this length: most have sizes in tokens.

    Args:
        model: as for `tamis.compile`; or a `CompiledModel` or `TokenGraph`, which is not captured again.
        args: an example prompt, positional; kwargs: by keyword.
        data: prompts: a .npz or .npy file as for `CompiledModel.verify`, or calls (a mapping, a tuple, a tensor each);
            the example when None.  Texts like those that the model is for.
        patterns: passes to choose from; those of `passes.sparse_candidates` for budget and length when None.
        budget: largest cost of a head, of dense attention, in (0, 1].
        least: heads whose best recall is lower stay dense; 0: none does that has a pattern within the budget.
        share: who shares a choice, for patterns that have one: "query", "kv" (heads of a group then get one pattern) or
            "layer"; None: as the patterns say.
        every: look at one query of so many, for speed.

    Raises:
        NothingToMeasure: no layer takes a pattern.
        NoPatternFound: every head stays dense.
        TooShortToCalibrate: prompts have too few tokens for any pattern.
        InputMismatch, ModelNotFound, UnreadableData: data does not fit the model, is not there, or is no array file.
        BadParameter.
    """
    check_whole("calibrate", 1, every=every)
    graph, call, _ = captured_for("calibrate", model, args, kwargs)
    calls = [call] if data is None else prompts_of("calibrate", graph.program, call, data)
    for one in calls:
        check_fits(f"calibrate: {graph.name}", graph, one)
    return search(graph, calls, patterns, budget=budget, least=least, share=share, every=every)


def search(
    graph: TokenGraph, calls: Sequence[Call], patterns: Any, *, budget: float, least: float, share: Any, every: int = 1
) -> Calibration:
    """`calibrate` on a captured model and its calls."""
    _check(budget, least, share)
    tokens = max(_tokens(graph, call) for call in calls)
    tried = _tried(patterns, tokens, budget, share)
    outcomes: list[Outcome] = []
    places = [placed_for("calibrate", graph, Pipeline((one,)), outcomes).values() for one in tried]
    at = [{layer.index for layer, _ in layers} for layers in places]
    sums: dict[tuple[int, int], _Measured] = {}
    for call in calls:
        for layer, heads in heads_of("calibrate", graph, call, sorted(set().union(*at))):
            own = [number for number, layers in enumerate(at) if layer.index in layers]
            measured = _measured(heads, [tried[number] for number in own], budget, every)
            for number, one in zip(own, measured, strict=True):
                key = layer.index, number
                sums[key] = sums[key] + one if key in sums else one
    return _chosen(graph, tried, sums, Calibration((), (), budget, least, tokens, sum(map(_rows, calls))))


def _check(budget: Any, least: Any, share: Any) -> None:
    for name, value in (("budget", budget), ("least", least)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 <= value <= 1 and (value or name == "least")):
            rule, hint = "in (0, 1]" if name == "budget" else "between 0 and 1", "a fraction of dense attention."
            raise BadParameter(where="calibrate", name=name, rule=rule, got=brief(value), hint=hint)
    if share not in (None, "query", *SHARING):
        rule, hint = "one of query, kv, layer", "None leaves it to the patterns."
        raise BadParameter(where="calibrate", name="share", rule=rule, got=brief(share), hint=hint)


@dataclass(frozen=True)
class _Measured:
    """One pattern at one layer: what it reads of queries that count and of early ones, alone, and operations."""

    late: Held
    early: Held
    alone: Held | None
    choosing: float
    dense: float

    def __add__(self, other: _Measured) -> _Measured:
        alone = None if self.alone is None or other.alone is None else self.alone + other.alone
        flops = self.choosing + other.choosing, self.dense + other.dense
        return _Measured(self.late + other.late, self.early + other.early, alone, *flops)

    @property
    def cost(self) -> list[float]:
        return [one + self.choosing / self.dense for one in (self.early + self.late).density]


@torch.no_grad()
def _measured(heads: Heads, methods: Sequence[SparseAttention], budget: float, every: int) -> list[_Measured]:
    after = int(budget * (heads.tokens + 1) / 2)
    indexes, flops = [], []
    for method in methods:
        with FlopCounterMode(display=False) as counter:
            indexes.append(method.index(heads))
        flops.append(counter.get_total_flops())
    sharing = [i for i, method in enumerate(methods) if getattr(method, "share", None) in SHARING]
    apart = [replace(methods[i], share="query").index(heads) for i in sharing]  # type: ignore[call-arg]
    late = held(heads, [*indexes, *apart], after, every)
    early = held(heads, indexes, 0, every, before=after)
    alone = dict(zip(sharing, late[len(indexes) :], strict=True))
    batch, many, tokens, size = heads.queries.shape
    dense = 2.0 * batch * many * tokens * tokens * size
    return [_Measured(late[i], early[i], alone.get(i), flops[i], dense) for i in range(len(methods))]


def _chosen(
    graph: TokenGraph, tried: Sequence[SparseAttention], sums: Mapping[tuple[int, int], _Measured], found: Calibration
) -> Calibration:
    heads: list[HeadPattern] = []
    at: dict[int, dict[int, list[int]]] = {}
    for layer in sorted({layer for layer, _ in sums}):
        site = graph.sites[graph.layers[layer].site]
        own = {number: sums[layer, number] for place, number in sums if place == layer}
        shares = {getattr(tried[number], "share", "") for number in own}
        unit = site.heads if "layer" in shares else site.heads // site.kv_heads if "kv" in shares else 1
        for start in range(0, site.heads, unit):
            some = range(start, start + unit)
            number = _best(own, some, found.budget)
            best = 0.0 if number is None else _over(own[number].late.recall, some)
            if number is None or best < found.least:
                heads += [HeadPattern(layer, head, "dense", 1.0, 1.0, best) for head in some]
                continue
            heads += [_pattern(layer, head, tried[number], own[number]) for head in some]
            at.setdefault(number, {}).setdefault(layer, []).extend(some)
    passes = tuple(replace(tried[number], layers=None, heads=places) for number, places in sorted(at.items()))
    if not passes:
        most = f"{max(one.best for one in heads):.4f}"
        raise NoPatternFound(least=found.least, budget=found.budget, best=most)
    return replace(found, passes=passes, heads=tuple(heads))


def _best(own: Mapping[int, _Measured], some: range, budget: float) -> int | None:
    """The pattern within the budget of largest recall over some heads; the cheapest, then the first of several."""
    found = [
        (-_over(one.late.recall, some), _over(one.cost, some), number)
        for number, one in own.items()
        if _over(one.cost, some) <= budget * SLACK
    ]
    return min(found)[2] if found else None


def _pattern(layer: int, head: int, method: SparseAttention, found: _Measured) -> HeadPattern:
    recall, alone = found.late.recall[head], None if found.alone is None else found.alone.recall[head]
    return HeadPattern(layer, head, str(method), recall, found.cost[head], recall, alone)


def _tried(patterns: Any, tokens: int, budget: float, share: str | None) -> list[SparseAttention]:
    if patterns is None:
        if tokens < SHORTEST:
            raise TooShortToCalibrate(tokens=tokens, least=SHORTEST)
        return candidates(tokens, budget, share or "query")
    tried: list[Any] = []
    for one in Pipeline.parse(patterns).passes:
        if (heads := getattr(one, "heads", None)) is not None:
            hint = "which heads get a pattern is what is searched for."
            raise BadParameter(where=one.name, name="heads", rule="left out to calibrate", got=heads, hint=hint)
        shares = share is not None and hasattr(one, "share")
        tried.append(replace(one, share=share) if shares else one)  # type: ignore[call-arg]
    if not tried:
        hint = "None tries those of tamis.passes.sparse_candidates."
        raise BadParameter(where="calibrate", name="patterns", rule="given", got="none", hint=hint)
    return tried


def _tokens(graph: TokenGraph, call: Call) -> int:
    mask = mask_of(graph.program, call)
    return stream_length(graph, call) or 0 if mask is None else int(mask[1].bool().sum(1).max())


def _rows(call: Call) -> int:
    from torch.utils import _pytree as pytree

    return next((leaf.shape[0] for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)), 1)


def _over(values: Sequence[float], some: range) -> float:
    return sum(values[head] for head in some) / len(some)


def _mean(heads: Sequence[HeadPattern], name: str) -> float:
    return sum(getattr(one, name) for one in heads) / len(heads)
