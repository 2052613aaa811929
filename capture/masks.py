"""What a mask does, found by evaluating the nodes that build it, not by their pattern.

The cone of nodes above a mask (two dozen arange and index nodes in HF models, other ones in every release) is run at a
few lengths and paddings and the result is compared with what each kind of mask would be.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ..graph import Mask
from .closure import ancestors
from .mask_trials import Cone, Trial

HIDDEN = -1e4  # an additive mask at or below this hides a key; half types' minimum is -65504
TRIALS = (Trial("none", 6), Trial("right", 7), Trial("left", 7), Trial("both", 9))
LONGEST = 4352  # tokens of the longest trial: a table of 4096 and a few rows takes a fraction of a second

Tables = list[tuple[Trial, Tensor]]


class MaskReader:
    """Classifies the masks of one program; each mask node is evaluated once however many sites share it."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.known: dict[str, Mask] = {}
        self.constants = _constants(program)

    def read(self, node: Any) -> Mask:
        """The kind of a mask argument (None, or a node broadcastable to [B, H, N, M])."""
        if not isinstance(node, fx.Node):
            return Mask()
        if node.name not in self.known:
            self.known[node.name] = self._read(node)
        return self.known[node.name]

    def _read(self, node: fx.Node) -> Mask:
        additive = node.meta["val"].dtype != torch.bool
        as_bias = Mask("bias", node.name, additive=additive)
        cone = Cone(node, ancestors(node), self.constants)
        fillers = sorted(set(cone.fillers()))
        values = _tables(cone, [*TRIALS, *(Trial("right", 7, real=c + 1, fill=c) for c in fillers)])
        if not values:
            return as_bias
        tables = [(trial, _seen(table)) for trial, table in values]
        found = _kind(tables)
        if found is None:
            return replace(as_bias, causal=_hides_later(tables))
        as_bias = replace(as_bias, padded=found.padded, causal=found.causal)
        length = self._telling_length(cone)
        if length is None or any(_is_graded(table) for _, table in values):
            return as_bias
        if length > TRIALS[-1].length:
            long = _tables(cone, [Trial("none", length, batch=1)])
            found = _kind([*tables, *((trial, _seen(table)) for trial, table in long)]) if long else None
        if found is None:
            return as_bias
        real = _real_node(cone, tables) if found.padded else None
        return replace(found, node=None if found.kind == "full" else node.name, real=real, additive=additive)

    def _telling_length(self, cone: Cone) -> int | None:
        """A length at which every window that the mask may have is seen; None: longer than can be tried."""
        most = _most(cone.node.meta["val"].shape[-1], self.program)
        telling = min(max(cone.turning_points(), default=0) + 2, most)
        return telling if telling <= LONGEST else None


def _tables(cone: Cone, trials: list[Trial]) -> Tables:
    """The mask at every trial.

    Empty where it is no table [N, M] or [B, H, N, M], or cannot run on made-up inputs: such a mask is kept as it
    stands, which is always right.
    """
    try:
        tables = [(trial, cone.run(trial)) for trial in trials]
    except Exception:
        return []
    return tables if all(table.dim() in (2, 4) for _, table in tables) else []


def _real_node(cone: Cone, tables: Tables) -> str | None:
    """The last node [B, N] of a mask's cone that is nonzero where the mask hides no padding, at every trial.

    The mask itself says so too, but only as a table [N, N].
    """
    shapes = [(one, one.meta.get("val")) for one in cone.nodes]
    left = [one for one, value in shapes if isinstance(value, Tensor) and value.dim() == 2 and one is not cone.node]
    for trial, seen in tables:
        keys = (torch.diagonal(seen, dim1=-2, dim2=-1) if seen.shape[-2] > 1 else seen[:, :, 0])[:, 0]
        values = cone.values(trial, left)
        left = [one for one in left if values[one].shape == keys.shape and bool(((values[one] != 0) == keys).all())]
    return left[-1].name if left else None


def _most(size: Any, program: ExportedProgram) -> int:
    """The largest value that a size can take."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    limits = program.range_constraints.get(size.node.expr)
    return int(limits.upper) if limits is not None and limits.upper.is_Integer else sys.maxsize


def _constants(program: ExportedProgram) -> dict[str, Tensor]:
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found = {place: program.state_dict.get(name, program.constants.get(name)) for place, name in names.items()}
    found.update(
        {place: program.constants[name] for place, name in signature.inputs_to_lifted_tensor_constants.items()}
    )
    return {place: value for place, value in found.items() if isinstance(value, Tensor)}


def _seen(table: Tensor) -> Tensor:
    """[., ., N, M] bool: which keys a mask does not hide."""
    seen = table if table.dtype == torch.bool else table > HIDDEN
    return seen if seen.dim() == 4 else seen[None, None]


def _is_graded(table: Tensor) -> bool:
    """Whether a mask does more than hide keys; one number at all others, usually 0, does nothing to a softmax."""
    if table.dtype == torch.bool:
        return False
    others = table[table > HIDDEN]
    return bool((others != others[:1]).any())


def _kind(tables: Tables) -> Mask | None:
    """The kind that all tables of seen keys agree on; None when they fit none."""
    seen = [table for _, table in tables]
    if all(bool(t.all()) for t in seen):
        return Mask("full")
    if not all(bool((t == t[:, :1]).all()) for t in seen):
        return None
    if all(bool((t == t[:, :, :1]).all()) for t in seen):
        return Mask("padding", padded=True)
    if any(t.shape[-2] != t.shape[-1] for t in seen):
        return None
    before, after = _reach(tables)
    keys = [torch.diagonal(t, dim1=-2, dim2=-1).unsqueeze(-2) for t in seen]  # every token sees itself
    if not all(bool((t == (_band(t, before, after) & k)).all()) for t, k in zip(seen, keys, strict=True)):
        return None
    padded = not all(bool(k.all()) for k in keys)
    if before is None and after == 0:
        return Mask("causal", padded=padded, causal=True)
    return Mask("window", padded=padded, causal=after == 0, window=(before, after))


def _reach(tables: Tables) -> tuple[int | None, int | None]:
    """How far back and ahead a token sees in the longest table without padding; None: to the end."""
    table = max((t for trial, t in tables if trial.padding == "none"), key=lambda t: t.shape[-1])[0, 0]
    last = table.shape[-1] - 1
    before = int(table[-1].flip(0).nonzero().amax()) if bool(table[-1].any()) else 0
    after = int(table[0].nonzero().amax()) if bool(table[0].any()) else 0
    return (None if before == last else before), (None if after == last else after)


def _band(like: Tensor, before: int | None, after: int | None) -> Tensor:
    seen = torch.ones(like.shape[-2:], dtype=torch.bool, device=like.device)
    seen = seen if before is None else seen.triu(-before)
    return seen if after is None else seen.tril(after)


def _hides_later(tables: Tables) -> bool:
    """Whether no query sees a later key."""
    return all(t.shape[-2] == t.shape[-1] and not bool(t.triu(1).any()) for _, t in tables)


def user_inputs(program: ExportedProgram) -> Iterator[fx.Node]:
    """Placeholders that the user fills."""
    names = set(program.graph_signature.user_inputs)
    return (node for node in program.graph.nodes if node.op == "placeholder" and node.name in names)
