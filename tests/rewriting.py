"""Capture, rewrite, run: the short way that network tests take, and how their results are compared."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from zoo import FAMILIES, Family

from tamis.capture import capture
from tamis.graph import TokenGraph
from tamis.rewrite import Pipeline, Result


@cache
def captured(name: str, dtype: torch.dtype = torch.float64, batch: int = 2) -> TokenGraph:
    """The family's graph, captured from an example of `batch` rows."""
    family = FAMILIES[name]
    args, kwargs = family.inputs(batch, dtype=dtype)
    return capture(family.shared(dtype), args, kwargs=kwargs)


@lru_cache(maxsize=64)
def rewritten(name: str, passes: str, dtype: torch.dtype = torch.float64, batch: int = 2, **options: bool) -> Result:
    """The family's graph after `passes`."""
    return Pipeline.parse(passes).run(captured(name, dtype, batch), **options)


@torch.no_grad()
def run(result: Result | TokenGraph, inputs: Any) -> list[Tensor]:
    """Outputs of the program in order."""
    args, kwargs = inputs
    graph = result.graph if isinstance(result, Result) else result
    return pytree.tree_leaves(graph.program.module()(*args, **kwargs))


def distance(got: Tensor, expected: Tensor) -> float:
    """Largest relative L2 difference of any row of the batch."""
    assert got.shape == expected.shape, f"{tuple(got.shape)} is not {tuple(expected.shape)}"
    gap = (got.double() - expected.double()).flatten(1).norm(dim=1)
    return float((gap / expected.double().flatten(1).norm(dim=1).clamp(min=1e-30)).max())


def assert_equal_outputs(got: list[Tensor], expected: list[Tensor], budget: float) -> None:
    """Every output within a relative L2 budget, row by row."""
    assert len(got) == len(expected)
    for index, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        gap = distance(mine, theirs)
        assert gap <= budget, f"output {index} differs by {gap:.3g} (relative L2)"


def applied(result: Result) -> list[Any]:
    """The outcomes of places that were changed."""
    return [outcome for outcome in result.outcomes if outcome.applied]


def real_rows(family: Family, inputs: Any, output: Tensor) -> list[Tensor]:
    """Rows of real tokens, one tensor [n, C] for each row of the batch."""
    mask = inputs[1].get("attention_mask")
    if mask is None:
        return list(output)
    return [row[keep.bool()] for row, keep in zip(output, mask, strict=True)]
