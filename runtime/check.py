"""`--check` and `--list-passes`: what is in a model, which passes there are, and where each would apply."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from ..errors import TamisError
from ..graph import Site, TokenGraph
from ..registry import registered_passes
from ..rewrite import Pass, Pipeline
from .inputs import Call, describe

TRIES: tuple[dict[str, Any], ...] = ({}, {"r": 1}, {"keep_ratio": 0.9})  # the first that a pass accepts is tried


def list_passes() -> list[dict[str, Any]]:
    """Name, family, first line of the docstring and parameters with their defaults of every registered pass."""
    return [
        {
            "name": name,
            "family": cls.family,
            "doc": (inspect.getdoc(cls) or "").split("\n")[0],
            "parameters": {f.name: _default_text(f) for f in dataclasses.fields(cls)},
        }
        for name, cls in registered_passes().items()
    ]


def check_model(graph: TokenGraph, call: Call, step: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Sites, stream, and for every registered pass where it would apply and where not and why.  Writes nothing.

    A pass is tried with its default parameters, or r=1, or keep_ratio=0.9, whichever it accepts first.
    """
    layer_of = {layer.site: layer.index for layer in graph.layers}
    checked = []
    for name, cls in registered_passes().items():
        step(f"trying {name}")
        checked.append(_try(name, cls, graph))
    return {
        "name": graph.name,
        "source_hash": graph.source_hash,
        "summary": _summary(graph),
        "inputs": describe(graph.program, call),
        "prefix": graph.prefix,
        "class_token": graph.class_token,
        "grid": graph.grid,
        "sites": [_site(site, layer_of) for site in graph.sites],
        "passes": checked,
    }


def _summary(graph: TokenGraph) -> str:
    parts = [f"{len(graph.sites)} attention sites", f"{len(graph.layers)} layers in the token stream"]
    parts += [f"{graph.prefix} prefix tokens"] if graph.prefix else []
    parts += ["class token"] if graph.class_token else []
    parts += [f"grid {graph.grid[0]} x {graph.grid[1]}"] if graph.grid else []
    return ", ".join(parts)


def _site(site: Site, layer_of: dict[int, int]) -> dict[str, Any]:
    return {
        "site": site.index,
        "node": site.node,
        "module": site.module,
        "role": site.role,
        "heads": f"{site.heads} x {site.head_dim}",
        "mask": "causal" if site.causal else site.mask.kind,
        "layer": layer_of.get(site.index, ""),
        "reason": site.reason,
    }


def _try(name: str, cls: type[Pass], graph: TokenGraph) -> dict[str, Any]:
    answer = {"name": name, "applies": False, "tried": "", "layers": "", "reason": ""}
    one = _with_defaults(cls)
    if one is None:
        return {**answer, "reason": "it has parameters without a default; name them with --pass"}
    answer["tried"] = str(one)
    reason = one.why_not(graph)
    if reason:
        return {**answer, "reason": _one_line(reason)}
    try:
        outcomes = Pipeline((one,)).run(graph, allow_noop=True).outcomes
    except TamisError as error:
        return {**answer, "reason": _one_line(str(error))}
    except Exception as error:  # one broken pass (a plug-in's, say) must not hide the answers for the others
        return {**answer, "reason": f"it failed: {type(error).__name__}: {_one_line(str(error))}"}
    applied = [str(o.layer) for o in outcomes if o.applied]
    skipped: dict[str, list[str]] = {}
    for outcome in outcomes:
        if not outcome.applied:
            skipped.setdefault(outcome.reason, []).append(str(outcome.layer))
    reasons = "; ".join(f"layer {', '.join(at)}: {why}" for why, at in skipped.items())
    return {**answer, "applies": bool(applied), "layers": ", ".join(applied), "reason": reasons}


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
