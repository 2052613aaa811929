"""Where every original token was after each reduction of a rewritten program, seen in a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..graph import op_name
from ..report import Report
from .inputs import Call

APPLIES = ("tamis.merge_tokens", "tamis.reduce_tokens")  # (x, slot, ...): a plan is applied to the stream


@dataclass(frozen=True)
class Stage:
    """The stream after one reduction.

    method, layer  which made it, and where; the reduction by itself where the report does not say
    source         [B, N0] int64: the slot that every original token is in, -1 where it was dropped
    before, tokens  slots of a row before and after, those without a token counted too
    inside         the reduction holds inside a sub-layer only; `source` is of it alone, not of those before
    """

    method: str
    layer: int | None
    source: Tensor
    before: int
    tokens: int
    inside: bool = False


def journey(program: ExportedProgram, call: Call, report: Report) -> list[Stage]:
    """The stages of a run, in order; [] when nothing is reduced."""
    slots = _slots_of(program, call)
    applied: list[dict[str, Any]] = [one for one in report.outcomes if one["applied"] and _removes(one)]
    said = applied if len(applied) == len(slots) else [{"pass": "", "layer": None}] * len(slots)
    stages: list[Stage] = []
    source: Tensor | None = None
    for one, (slot, before, tokens) in zip(said, slots, strict=True):
        inside = bool(one.get("inside"))
        now = slot if source is None or inside else torch.where(source < 0, -1, slot.gather(1, source.clamp(min=0)))
        stages.append(Stage(one["pass"], one["layer"], now, before, tokens, inside))
        source = source if inside else now
    return stages


def _removes(outcome: dict[str, Any]) -> bool:
    """Whether tokens may have left, and be it as many as came in: passes that only let some in apply no plan.

    Nor does sparse attention, whose outcomes have no counts.
    """
    before, after = outcome["before"], outcome["after"]
    return before is not None and not (isinstance(before, int) and isinstance(after, int) and after > before)


def _slots_of(program: ExportedProgram, call: Call) -> list[tuple[Tensor, int, int]]:
    """Slot [B, N] of every plan in the order in which they are applied, and how many tokens are before and after it."""
    seen: dict[fx.Node, tuple[Tensor, int, int]] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and op_name(n) in APPLIES and n.args[1] not in seen:
                x, slot = (self.env[arg] for arg in n.args[:2])
                out = value[0] if isinstance(value, tuple | list) else value
                seen[n.args[1]] = (slot.expand(x.shape[0], -1), int(x.shape[1]), int(out.shape[1]))
            return value

    module = program.module()
    assert isinstance(module, fx.GraphModule)
    with torch.no_grad():
        Watch(module, garbage_collect_values=False).run(*pytree.tree_leaves(call), enable_io_processing=False)
    return list(seen.values())
