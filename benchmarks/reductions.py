"""What the accuracy tables compare: every registered token reduction at several amounts, and the control beside it."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tamis.counts import CountRule
from tamis.passes.methods.random_drop import RandomDrop
from tamis.passes.reduction import TokenReduction
from tamis.registry import origin_of, registered_passes
from tamis.rewrite import Pipeline
from tamis.runtime.api import Options, Prepared, build
from tamis.weights import TrainedPass

KEEP_RATIOS = (0.9, 0.7, 0.5)
FLOPS = (0.8, 0.6, 0.4)  # of the dense model's
Compiled = Any


def methods() -> list[type[TokenReduction]]:
    """Tamis's own token reductions, by name; a new one appears by itself."""
    known = [cls for cls in registered_passes().values() if issubclass(cls, TokenReduction) and not cls.grows]
    return [cls for cls in known if origin_of(cls) == "tamis"]


def compiled(prepared: Prepared, method: TokenReduction) -> Compiled:
    """The captured model rewritten by one method, with a report on tokens and FLOPs; raises TamisError."""
    return build(prepared, Pipeline((method,)), Options(), verify=False)


def flops_share(model: Compiled) -> float:
    """FLOPs of a result over those of its original."""
    return model.report.flops_after / model.report.flops_before


def drawn(method: TokenReduction, seed: int) -> TokenReduction:
    """The method with another seed, if it has one."""
    has_seed = any(f.name == "seed" for f in dataclasses.fields(method))
    return dataclasses.replace(method, seed=seed) if has_seed else method


def is_control(method: TokenReduction) -> bool:
    """Whether it is random drop itself, at layers of its own choice."""
    return isinstance(method, RandomDrop)


def control_of(method: TokenReduction, seed: int) -> RandomDrop:
    """Random drop at the places of `method` that leaves as many tokens at each; a fused token counts as one."""

    class EqualCounts(RandomDrop):
        where = method.where
        limit = method.limit

        def selected(self, layers: int) -> list[int]:
            return method.selected(layers)

        def rule(self, layer: int, layers: int, prefix: int) -> CountRule:
            rule = method.rule(layer, layers, prefix)
            terms = tuple((a, b - rule.added * c, c) for a, b, c in rule.terms)
            return dataclasses.replace(rule, terms=terms, added=0)

    return EqualCounts(r=1, seed=seed)  # its own r is never asked for


def extent(cls: type[TokenReduction], share: float, depth: int) -> dict[str, Any]:
    """The parameter of a method with which its FLOPs grow, from a share of the whole in (0, 1].

    That is the keep ratio or, where a method has a count of its own, the one layer at which it acts.
    """
    return {"layers": [min(depth - 1, int(share * depth))]} if cls.own_count is True else {"keep_ratio": share}


def parts_of(cls: type[TokenReduction], parts: Mapping[str, Path]) -> dict[str, Any]:
    """The parameter with which a trained method gets its tensors for a model: a file, or None, which it refuses."""
    if not issubclass(cls, TrainedPass):
        return {}
    return {"weights": os.path.relpath(parts[cls.name]) if cls.name in parts else None}


def levels(
    make: Callable[[float], TokenReduction], prepared: Prepared, ratios: tuple[float, ...] = KEEP_RATIOS
) -> dict[str, tuple[TokenReduction, Compiled]]:
    """Title -> a method and its compiled model, at the keep ratios and at the FLOPs to compare at.

    make  a method from its share, see `extent`
    """
    at = functools.cache(lambda hundredths: compiled(prepared, make(hundredths / 100)))
    chosen = {f"keep ratio {ratio}": round(100 * ratio) for ratio in ratios}
    known = {hundredths: flops_share(at(hundredths)) for hundredths in chosen.values()}
    for target in FLOPS:
        nearest = _nearest(lambda hundredths: flops_share(at(hundredths)), known, target)
        chosen[f"{target:.0%} of the FLOPs"] = nearest
    return {title: (make(hundredths / 100), at(hundredths)) for title, hundredths in chosen.items()}


def nearest_to(make: Callable[[float], TokenReduction], prepared: Prepared, share: float) -> TokenReduction:
    """The method whose model comes nearest to this share of the dense model's FLOPs.

    make  a method from its share in hundredths, see `extent`
    """
    found = _nearest(lambda hundredths: flops_share(compiled(prepared, make(hundredths / 100))), {}, share)
    return make(found / 100)


def _nearest(share: Callable[[int], float], known: dict[int, float], target: float) -> int:
    """The share in hundredths whose part of the FLOPs is nearest to the target; the one grows with the other.

    known  shares that are there already; what is asked for here is added
    """
    known.update({100: 1.0, 1: 0.0})  # one is so by definition, the other is never the answer
    low = max(hundredths for hundredths, value in known.items() if value <= target)
    high = min(hundredths for hundredths, value in known.items() if value > target)
    while high - low > 1:
        inside = (target - known[low]) / (known[high] - known[low])
        middle = min(high - 1, max(low + 1, round(low + inside * (high - low))))
        known[middle] = share(middle)
        low, high = (middle, high) if known[middle] <= target else (low, middle)
    return min((low, high), key=lambda hundredths: abs(known[hundredths] - target))
