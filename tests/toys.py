"""A toy model and toy passes: what the runtime does around a rewrite is tested without the rewriter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from zoo import draw

from tamis.graph import TokenGraph
from tamis.rewrite import Options, Outcome, Pass, Result
from tamis.runtime.api import Prepared, build
from tamis.runtime.compiled import CompiledModel
from tamis.runtime.options import Options as CompileOptions


class Toy(nn.Module):
    """Token ids and their mask -> logits [B, 5] and tokens [B, N, 8].  `scale` is what toy passes change."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.head = nn.Linear(8, 5)
        self.scale = scale

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        tokens = self.embed(input_ids)
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        logits = self.head((tokens * weights).sum(1) / weights.sum(1)) * self.scale
        return {"logits": logits, "tokens": tokens + (1 - weights) * (self.scale - 1) * 100}


def toy_call(batch: int = 2, length: int = 8) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Row i has length - i real tokens."""
    ids = torch.arange(batch * length).reshape(batch, length) % 64
    mask = (torch.arange(length)[None] < length - torch.arange(batch)[:, None]).long()
    return (), {"input_ids": ids, "attention_mask": mask}


def toy_graph(scale: float = 1.0, weights: dict[str, Any] | None = None) -> TokenGraph:
    """The toy, exported with dynamic batch and length."""
    model = draw(Toy(scale)).eval()
    if weights is not None:
        model.load_state_dict(weights, assign=True)
    args, kwargs = toy_call()
    dims = {name: {0: Dim("batch"), 1: Dim("sequence")} for name in kwargs}
    program = torch.export.export(model, args, kwargs, dynamic_shapes=dims, strict=False)
    return TokenGraph(program, name="toy", source_hash="abc" * 20)


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply the logits by `by`; 1 changes nothing."""

    by: float = 1.1

    def apply(self, graph: TokenGraph, options: Options) -> Result:
        """Export the toy again with another scale and the same weights."""
        if self.by == 1:
            return Result(graph, (Outcome(str(self), None, "", False, "1 is the identity"),))
        changed = toy_graph(self.by, dict(graph.program.state_dict))
        return Result(graph.with_program(changed.program), (Outcome(str(self), None, "", True),))


@dataclass(frozen=True)
class Fail(Pass):
    """Cannot apply, and says so."""

    def why_not(self, graph: TokenGraph) -> str:
        """Never."""
        return "toys have no attention"

    def apply(self, graph: TokenGraph, options: Options) -> Result:
        """Fail."""
        raise RuntimeError("a bug")


PASSES: dict[str, type[Pass]] = {"scale": Scale, "fail": Fail}


def toy_compiled(by: float = 1.1, **options: Any) -> CompiledModel:
    """The toy compiled with the pass scale."""
    checked = CompileOptions(**options)
    return build(Prepared(toy_graph(), toy_call()), checked.checked(f"scale:by={by}"), checked)
