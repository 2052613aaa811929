"""MInference's patterns: each head has the one that an offline search found for it.

Source: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
NeurIPS 2024, arXiv 2407.02490, section 3.2 and the configurations released with it (methods, llm 1.4).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...errors import BadParameter
from ...graph import TokenGraph
from ...recipe_errors import PatternsUnreadable
from ...registry import register
from ...rewrite import Options, Pass, Result
from ..sparse import SparseAttention
from .a_shape import AShape
from .block_sparse import BlockSparse
from .vertical_slash import VerticalSlash

KINDS = ("vertical_and_slash", "stream_llm", "block_sparse")


@register("minference")
@dataclass(frozen=True)
class MInference(Pass):
    """Every head reads by the pattern that a file gives it: vertical-slash, a-shape or block-sparse.

    It stands for one pass per pattern with the heads that have it, and these are what a recipe holds.  Each pattern of
    a layer is one attention over its heads, so that none pays for the largest budget.  Heads of which nothing is said
    stay dense.  Differs from the published code: a stream_llm or block_sparse pattern is used as such, where the
    release falls back to vertical-slash; and a head may stay dense because its score is low.

    Args:
        patterns: a JSON file, or what it holds: for every layer (a list, or a mapping from the layer) a mapping from
            the head to `["vertical_and_slash", columns, slashes, score]`, `["stream_llm", sink, local, score]` or
            `["block_sparse", tiles, 0, score]`.
        least: heads whose score, the recall found offline, is lower stay dense; 0: none does.
    """

    family: ClassVar[str] = "sparse"

    patterns: Any = None
    least: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patterns is None:
            hint = "patterns=FILE.json."
            raise BadParameter(where=self.name, name="patterns", rule="given", got="nothing", hint=hint)
        source, data = _loaded(self.patterns)
        found: dict[tuple[str, int, int], dict[int, list[int]]] = {}
        for layer, head, kind, first, second, score in _rows(source, data):
            if score >= self.least:
                found.setdefault((kind, first, second), {}).setdefault(layer, []).append(head)
        if not found:
            raise PatternsUnreadable(path=source, reason=f"no head has a score of {self.least} or more")
        made = tuple(_pass(*key, heads) for key, heads in found.items())
        for one in made if isinstance(self.patterns, str | os.PathLike) else ():
            object.__setattr__(one, "asked_by", source)
        object.__setattr__(self, "_passes", made)  # no parameter

    def expanded(self) -> Sequence[Pass]:
        """A pass for every pattern."""
        passes: tuple[Pass, ...] = vars(self)["_passes"]
        return passes

    def apply(self, graph: TokenGraph, options: Options) -> Result:
        """Rewrite with all of them."""
        return SparseAttention.apply_together(self.expanded(), graph, options)


def patterns_of(passes: Sequence[Pass], scores: Mapping[tuple[int, int], float]) -> list[dict[str, list[Any]]]:
    """What a file of patterns holds for passes with `heads={layer: [...]}` of the three kinds; others are left out.

    scores  by (layer, head); 1 where there is none
    """
    found: dict[int, dict[str, list[Any]]] = {}
    for one in passes:
        for layer, heads in (getattr(one, "heads", None) or {}).items():
            for head in heads:
                said = _said(one)
                if said:
                    found.setdefault(layer, {})[str(head)] = [*said, scores.get((layer, head), 1.0)]
    return [found.get(layer, {}) for layer in range(max(found, default=-1) + 1)]


def _said(one: Pass) -> list[Any]:
    if isinstance(one, VerticalSlash):
        return [KINDS[0], one.columns, one.slashes]
    if isinstance(one, AShape):
        return [KINDS[1], one.sink, one.local]
    return [KINDS[2], one.tiles, 0] if isinstance(one, BlockSparse) and one.tiles else []


def _pass(kind: str, first: int, second: int, heads: dict[int, list[int]]) -> SparseAttention:
    if kind == KINDS[0]:
        return VerticalSlash(columns=first, slashes=second, heads=heads)
    return AShape(sink=first, local=second, heads=heads) if kind == KINDS[1] else BlockSparse(tiles=first, heads=heads)


def _loaded(patterns: Any) -> tuple[str, Any]:
    if not isinstance(patterns, str | os.PathLike):
        return "patterns", patterns
    path = os.fspath(patterns)
    try:
        return path, json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = f"it is no JSON ({error})"
        if isinstance(error, OSError):
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"{error.strerror}".lower()
        raise PatternsUnreadable(path=path, reason=reason) from error


def _rows(source: str, data: Any) -> Iterator[tuple[int, int, str, int, int, float]]:
    """Layer, head, kind, its two numbers and the score of every head."""
    layers = dict(enumerate(data)) if isinstance(data, list) else data
    if not isinstance(layers, Mapping):
        raise PatternsUnreadable(path=source, reason=f"it holds no layers, but one {type(data).__name__}")
    for layer, heads in layers.items():
        if not isinstance(heads, Mapping):
            raise PatternsUnreadable(path=source, reason=f"layer {layer} is a {type(heads).__name__}")
        for head, said in heads.items():
            place = f"layer {layer}, head {head}"
            if not (isinstance(said, Sequence) and len(said) in (3, 4) and said[0] in KINDS):
                raise PatternsUnreadable(path=source, reason=f"{place}: {said!r} is none of {', '.join(KINDS)}")
            score = [*said, 1.0][3]
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise PatternsUnreadable(path=source, reason=f"{place}: its score is {score!r}, no number")
            at = _whole(source, place, layer), _whole(source, place, head)
            first = _whole(source, place, said[1], 1 if said[0] == KINDS[2] else 0)
            second = _whole(source, place, said[2], 1 if said[0] == KINDS[1] else 0)
            yield *at, said[0], first, second, float(score)


def _whole(source: str, place: str, value: Any, least: int | None = None) -> int:
    """A whole number, which JSON may hold as 3.0 and as a key must hold as "3"."""
    text = str(value)
    whole = not isinstance(value, bool) and re.fullmatch(r"-?\d+(\.0)?", text) is not None
    if not whole or (least is not None and float(text) < least):
        rule = "a whole number" if least is None else f"a whole number of {least} or more"
        raise PatternsUnreadable(path=source, reason=f"{place}: {value!r} is not {rule}")
    return int(text.partition(".")[0])
