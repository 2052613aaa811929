"""`--check` and `--list-passes`: what is in a model, which passes there are, and where each would apply."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import TamisError
from ..graph import Layer, Site, TokenGraph
from ..parameters import explained
from ..passes.sparse import SparseAttention
from ..registry import origin_of, registered_passes
from ..rewrite import Outcome, Pass, Pipeline
from .inputs import Call, describe
from .reach import has_one_length, reads_every_key

TRIES: tuple[dict[str, Any], ...] = ({}, {"r": 1}, {"keep_ratio": 0.9})  # the first that a pass accepts is tried
Step = Callable[[str], None]


def list_passes() -> list[dict[str, Any]]:
    """Name, family, origin and first line of the docstring of every registered pass, and its parameters.

    `parameters` has the default of each, `explained` what the docstring says of it (without those that no one does).
    """
    return [
        {
            "name": name,
            "family": cls.family,
            "origin": origin_of(cls),
            "doc": (inspect.getdoc(cls) or "").split("\n")[0],
            "parameters": {name: _default_text(f) for name, f in _parameters(cls).items()},
            "explained": {name: text for name, text in explained(cls).items() if name in _parameters(cls)},
        }
        for name, cls in registered_passes().items()
    ]


def _parameters(cls: type[Pass]) -> dict[str, dataclasses.Field[Any]]:
    """What a pass takes, by name: without the amounts where other parameters say how many tokens stay."""
    counts = ("r", "keep_ratio") if getattr(cls, "own_count", False) else ()
    return {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in counts}


def check_model(
    graph: TokenGraph, call: Call, step: Step = lambda text: None, passes: Sequence[Pass] = ()
) -> dict[str, Any]:
    """Sites, stream, and for every registered pass where it would apply and where not and why.  Writes nothing.

    A pass is tried with its default parameters, or r=1, or keep_ratio=0.9, whichever it accepts first.  Its `places`
    say of every attention site of the model what the pass would do there.  Its `near_misses` are softmaxes that look
    like attention that is none of its sites, with what was not as it should be.

    passes  those to try instead, each by itself and as it is
    """
    from ..capture.analysis import near_misses

    layer_of = {layer.site: layer for layer in graph.layers}
    asked: list[tuple[str, Pass | None]] = [(one.name, one) for one in passes]
    tried = asked or [(name, _with_defaults(cls)) for name, cls in registered_passes().items()]
    checked = []
    for name, one in tried:
        step(f"trying {name}")
        checked.append(_try(name, one, graph, call))
    return {
        "name": graph.name,
        "source_hash": graph.source_hash,
        "summary": _summary(graph),
        "refused": "",
        "near_misses": near_misses(graph.program),
        "inputs": describe(graph.program, call),
        "prefix": graph.prefix,
        "class_token": graph.class_token,
        "grid": graph.grid,
        "sites": [_site(site, layer_of.get(site.index)) for site in graph.sites],
        "passes": checked,
    }


def refused_model(name: str, error: TamisError) -> dict[str, Any]:
    """The answer for a model that has no tokens to reduce: the same keys, and why in `refused`."""
    reason = "the model has no stream of tokens to reduce"
    passes = [{**_answer(one), "reason": reason} for one in registered_passes()]
    known = {"source_hash": "", "inputs": {}, "prefix": 0, "class_token": False, "grid": None, "sites": []}
    known["near_misses"] = []
    summary = "no pass applies"
    return {"name": name, "summary": summary, "refused": str(error), **known, "passes": passes}


def _summary(graph: TokenGraph) -> str:
    parts = [_count(len(graph.sites), "attention site"), f"{_count(len(graph.layers), 'layer')} in the token stream"]
    parts += [_count(graph.prefix, "prefix token")] if graph.prefix else []
    parts += ["class token"] if graph.class_token else []
    parts += [f"grid {graph.grid[0]} x {graph.grid[1]}"] if graph.grid else []
    return ", ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _site(site: Site, layer: Layer | None) -> dict[str, Any]:
    grouped = f"{site.heads} / {site.kv_heads}" if site.kv_heads != site.heads else f"{site.heads}"
    return {
        "site": site.index,
        "node": site.node,
        "module": site.module,
        "role": site.role,
        "heads": f"{grouped} x {site.head_dim}",
        "mask": _mask(site),
        "soft cap": "" if site.softcap is None else site.softcap,
        "layer": "" if layer is None else layer.index,
        "cuts": "" if layer is None else ", ".join(_cuts(layer)),
        "rope": "yes" if site.k_rotation else "",
        "reason": site.reason or "; ".join(() if layer is None else layer.notes),
    }


def _mask(site: Site) -> str:
    """What hides keys at a site, `full` for nothing, and a cache: `causal + padding`, `window 64 before, 0 after`..."""
    mask = site.mask
    window = mask.kind
    if mask.window is not None:
        before, after = ("all" if size is None else size for size in mask.window)
        window = f"window {before} before, {after} after"
    parts = [window, *["causal"] * site.hides_later, *["padding"] * mask.padded, *["cache"] * site.cached]
    return " + ".join(part for part in dict.fromkeys(parts) if part != "full") or "full"


def _cuts(layer: Layer) -> list[str]:
    return [w.replace("_", " ") for w in ("before_attention", "after_attention", "after_block") if layer.cut(w)]


def _answer(name: str) -> dict[str, Any]:
    return {"name": name, "applies": False, "tried": "", "layers": "", "reason": "", "places": []}


def _try(name: str, one: Pass | None, graph: TokenGraph, call: Call) -> dict[str, Any]:
    answer = _answer(name)
    if one is None:
        reason = "it has parameters without a default; name them with --pass"
        return {**answer, "reason": reason, "places": _places(graph, (), reason)}
    answer["tried"] = str(one)
    reason, outcomes = _run(one, graph)
    if reason:
        return {**answer, "reason": reason, "places": _places(graph, (), reason)}
    idle = ""
    if isinstance(one, SparseAttention):
        idle = reads_every_key(graph, one, {o.layer for o in outcomes if o.applied}, call, search=False)
    if idle and has_one_length(graph):
        return {**answer, "reason": idle, "places": _places(graph, (), idle)}
    applied = [str(o.layer) for o in outcomes if o.applied]
    places = _places(graph, outcomes, "the pass does not choose this layer by default; layers=[...] does")
    return {
        **answer,
        "applies": bool(applied),
        "layers": ", ".join(applied),
        "reason": "; ".join(filter(None, [_grouped(places, outcomes), idle])),
        "places": places,
    }


def _run(one: Pass, graph: TokenGraph) -> tuple[str, tuple[Outcome, ...]]:
    """Why the pass cannot be run at all, or its outcomes."""
    reason = one.why_not(graph)
    if reason:
        return _one_line(reason), ()
    try:
        return "", _outcomes(one, graph)
    except TamisError as error:
        return _one_line(str(error)), ()
    except Exception as error:  # one broken pass (a plug-in's, say) must not hide the answers for the others
        return f"it failed: {type(error).__name__}: {_one_line(str(error))}", ()


def _outcomes(one: Pass, graph: TokenGraph) -> tuple[Outcome, ...]:
    """What a pass does everywhere; sparse attention changes no shape, so the first of layers alike answers for all."""
    if not isinstance(one, SparseAttention) or isinstance(one.heads, dict):
        return Pipeline((one,)).run(graph, allow_noop=True).outcomes
    alike: dict[str, list[Layer]] = {}
    for index in one.selected(len(graph.layers)):
        alike.setdefault(_kind(graph, graph.layers[index]), []).append(graph.layers[index])
    firsts: dict[int | None, list[Layer]] = {layers[0].index: layers for layers in alike.values()}
    tried = Pipeline((dataclasses.replace(one, layers=tuple(firsts)),)).run(graph, allow_noop=True).outcomes
    return tuple(
        dataclasses.replace(outcome, pass_name=str(one), layer=layer.index, site=graph.sites[layer.site].node)
        for outcome in tried
        for layer in firsts.get(outcome.layer, [])
    )


def _kind(graph: TokenGraph, layer: Layer) -> str:
    """All that a method may know of a layer's attention, but for what it is called and where it stands."""
    site = graph.sites[layer.site]
    mask = dataclasses.replace(site.mask, node=None, real=None)
    turns = [
        None if turn is None else (turn.axes, [axes for _, *axes in turn.tables])
        for turn in (site.q_rotation, site.k_rotation)
    ]
    names: dict[str, Any] = {"index": 0, "node": "", "q": "", "k": "", "v": "", "module": "", "source": ""}
    plain = dataclasses.replace(site, mask=mask, q_rotation=None, k_rotation=None, **names)
    shapes = [str(graph.node(name).meta["val"].shape) for name in (site.q, site.k, site.v)]
    return str((plain, turns, shapes))


def _places(graph: TokenGraph, outcomes: Sequence[Outcome], otherwise: str) -> list[dict[str, Any]]:
    """For every site: whether the pass applies there, with the token counts, and why not.

    `otherwise` is the reason at sites of the stream of which no outcome speaks.
    """
    layer_of = {layer.site: layer.index for layer in graph.layers}
    by_site = {outcome.site: outcome for outcome in outcomes}
    places = []
    for site in graph.sites:
        layer = layer_of.get(site.index)
        outcome = by_site.get(site.node)
        reason = outcome.reason if outcome else site.reason if layer is None else otherwise
        applies = bool(outcome and outcome.applied)
        reason = "" if applies else reason
        counts = [outcome.before, outcome.after] if outcome and applies else [None, None]
        counts = ["" if count is None else str(count) for count in counts]
        places.append({"site": site.index, "layer": layer, "applies": applies, "reason": _one_line(reason)})
        places[-1] |= {"tokens_in": counts[0], "tokens_out": counts[1]}
    return places


def _grouped(places: Sequence[dict[str, Any]], outcomes: Sequence[Outcome]) -> str:
    """Reasons with the layers they hold for, each once; those of the whole model as they are."""
    found: dict[str, list[str]] = {}
    for place in places:
        if not place["applies"] and place["layer"] is not None:
            found.setdefault(place["reason"], []).append(str(place["layer"]))
    whole = [o.reason for o in outcomes if o.layer is None and not o.applied]
    return "; ".join([*whole, *(f"layer {', '.join(at)}: {why}" for why, at in found.items())])


def _with_defaults(cls: type[Pass]) -> Pass | None:
    for parameters in TRIES:
        try:
            return cls(**parameters)
        except (TypeError, TamisError):
            continue
    return None


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        # As pass texts write them; 0 == False, so no dict can tell them apart.
        return str(field.default).lower() if isinstance(field.default, bool | None) else str(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    return "(required)"


def _one_line(text: str) -> str:
    return " ".join(text.split())
