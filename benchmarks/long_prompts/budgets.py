"""How each sparse attention method is given a density: one knob per method, turned until the pairs read are as wanted.

A method's own parameters say little about how many pairs it reads, so they are searched for: the index is built from
the dense model's queries and keys at a few layers of one text, and the pairs that it reads are counted.  Tiles are a
64th of the prompt, as 64 and 128 are of the 4k to 8k tokens at which the published methods begin to sparsify.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from tamis.attention_index import Heads
from tamis.passes.methods.block_sparse import TileMethod
from tamis.passes.sparse import SparseAttention
from tamis.registry import origin_of, registered_passes

from .watch import looked_at

CONTROL = "random-tiles"
UNSURE = ("flex-prefill", "pbs", "sparge", "vertical-slash", "x-attention")  # what they read follows from their input
NEAR = 0.1  # of the wanted density, by which a run may miss it
STEPS = 9  # halvings of the knob's range: the density is then as near as tiles allow
Knob = Callable[[float, int], dict[str, Any]]


def tile(tokens: int) -> int:
    """Tokens of a tile: the power of two nearest to a 64th of the prompt, 8 or more."""
    return int(max(8, 2 ** round(math.log2(tokens / 64))))


def _static(x: float, tokens: int) -> dict[str, Any]:
    return {"sink": tile(tokens), "local": max(1, round(x * tokens))}


def _slashes(x: float, tokens: int) -> dict[str, Any]:
    """As many columns as diagonals, the least of both scaled with the tiles."""
    block, many = tile(tokens), round(x * tokens / 2)
    return {"columns": many, "slashes": many, "sink": 4, "near": block, "block": block}


def _capped(parameter: str, published: float, **more: float) -> Knob:
    """A method with a threshold: as published with its tiles capped (x to 1); where that is too little, a higher one.

    more  parameters that go with the tile, as parts of it
    """

    def knob(x: float, tokens: int) -> dict[str, Any]:
        block = tile(tokens)
        threshold = published + max(0.0, 2 * x - 1) * (1 - published)
        others = {name: round(part * block) for name, part in more.items()}
        return {"density": min(1.0, 2 * x), "block": block, parameter: round(threshold, 4), **others}

    return knob


def _best_alike(x: float, tokens: int) -> dict[str, Any]:
    """The published form with a fixed share of tiles, which takes none for mixed: a guard would fill the share."""
    return {**_capped("threshold", 0.98)(x, tokens), "similarity": 1e-4}


def _halved(x: float, tokens: int) -> dict[str, Any]:
    """Stages in the proportions of the published ones, which are 256, 32 and 8 keys for rows of 64 queries."""
    block, keys = tile(tokens), max(1, round(x * tokens))
    chunks, keeps = (4 * block, block // 2, block // 8), (16 * keys, 4 * keys, keys)
    return {"sink": block, "local": 2 * block, "block": block, "chunks": chunks, "keeps": keeps}


def _looked_up(x: float, tokens: int) -> dict[str, Any]:
    """A window twice as wide as all blocks, as published (4096 tokens, 16 blocks of 128); rows are of a tile."""
    block = tile(tokens)
    local, blocks = (max(1, round(x * tokens * part / block)) for part in (2 / 3, 1 / 3))
    return {"sink": block // 4, "local": local * block, "blocks": blocks, "block": block, "chunk": block}


def _of_tiles(x: float, tokens: int) -> dict[str, Any]:
    return {"density": x, "block": tile(tokens)}


KNOBS: dict[str, Knob] = {
    "a-shape": _static,
    "dilated": _static,
    "tri-shape": lambda x, tokens: {**_static(x, tokens), "last": tile(tokens)},
    "lm-infinite": lambda x, tokens: {"local": max(1, round(x * tokens))},
    "streaming-llm": lambda x, tokens: {"local": max(1, round(x * tokens))},
    "longformer": lambda x, tokens: {"window": 2 * round(x * tokens)},
    "bigbird": lambda x, tokens: {"block": tile(tokens), "random": round(64 * x)},
    "vertical-slash": _slashes,
    "hip": _halved,
    "infllm": _looked_up,
    "pbs": _capped("threshold", 0.9, segment=2),
    "x-attention": _capped("threshold", 0.9, stride=1 / 8),
    "flex-prefill": _capped("gamma", 0.9, min_budget=4),
    "sparge": _best_alike,
}


def methods() -> list[type[SparseAttention]]:
    """Tamis's own sparse attention methods, by name; a new one appears by itself."""
    known = registered_passes().values()
    return [cls for cls in known if issubclass(cls, SparseAttention) and origin_of(cls) == "tamis"]


def knob_of(cls: type[SparseAttention]) -> Knob | None:
    """The method's knob; None where it has no index, or nobody has said how it is given a density."""
    if not cls.indexed:
        return None
    if cls.name in KNOBS:
        return KNOBS[cls.name]
    return _of_tiles if issubclass(cls, TileMethod) else None


def at_density(cls: type[SparseAttention], target: float, samples: Sequence[Heads], **fixed: Any) -> SparseAttention:
    """The method whose pairs read on the samples come nearest to `target` of the causal pairs; `fixed` parameters."""
    knob = knob_of(cls)
    assert knob is not None, cls.name
    tokens = samples[0].tokens
    low, high, best = 0.0, 1.0, (math.inf, cls())
    for _ in range(STEPS):
        middle = (low + high) / 2
        method = cls(**{**rounded(knob(middle, tokens)), **fixed})
        found = fmean(fmean(looked_at(method, heads).density) for heads in samples)
        best = min(best, (abs(found - target), method), key=lambda one: one[0])
        low, high = (middle, high) if found < target else (low, middle)
    return best[1]


def settled(
    cls: type[SparseAttention],
    target: float,
    samples: Sequence[Heads],
    run: Callable[[SparseAttention], float],
    **fixed: Any,
) -> SparseAttention:
    """`at_density`; a method that is unsure of what it reads is tried in a whole run, and its knob turned once more.

    run  the density of the rewritten model's own run: what layers see there is not what they see in the dense model
    """
    method = at_density(cls, target, samples, **fixed)
    if cls.name not in UNSURE:
        return method
    missed = run(method) / target
    return method if abs(missed - 1) <= NEAR else at_density(cls, target / missed, samples, **fixed)


def rounded(parameters: dict[str, Any]) -> dict[str, Any]:
    """Fractions to four digits, and never 0, so that a recipe reads well."""
    return {
        name: max(1e-4, round(value, 4)) if isinstance(value, float) else value for name, value in parameters.items()
    }
