"""The signature's side of a reduction: outputs at full length, and the token map as an output of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils._pytree import TreeSpec, tree_flatten

from .stream_state import StreamState, take_rows
from .token_axes import Axes


def restored_output(value: Any, axes: Axes, state: StreamState) -> Any:
    """A value with its token axes back at full length; rows of tokens dropped before it and of padding are zeros."""
    if axes.batch is None:
        raise ValueError("an output has its batch axis folded into another axis")
    for dim in axes.dims:
        value = state.restore(value, dim, axes.batch, axes.epoch, axes.start)
    return value


def without_padding(value: Any, axes: Axes, state: StreamState) -> Any:
    """A value of the original length with zeros in the rows of padding."""
    valid = state.first_valid
    if valid is not None and axes.batch is not None:
        index = _places(valid, valid.shape[0], valid.shape[1], valid.device)[:, axes.start :] - axes.start
        for dim in axes.dims:
            value = take_rows(value, index, dim, axes.batch)
    return value


def token_map(state: StreamState | None, hidden: Any, valid: torch.Tensor | None) -> torch.Tensor:
    """[B, N0] int64: for every original token the slot it ends in, -1 if it was dropped or is padding."""
    if state is not None and state.plans:
        return state.source()
    batch, count = hidden.shape[:2]
    return _places(valid, batch, count, hidden.device)


def _places(valid: torch.Tensor | None, batch: Any, count: Any, device: torch.device) -> torch.Tensor:
    """[B, N] int64: every token's own place, -1 for padding."""
    places = torch.arange(count, device=device).unsqueeze(0).expand(batch, count)
    return places.clone() if valid is None else torch.where(valid, places, -1)


def with_token_map(program: ExportedProgram) -> TreeSpec:
    """The output structure (outputs, token_map)."""
    _, pair = tree_flatten((0, 0))
    return TreeSpec(pair.type, pair.context, [program.call_spec.out_spec, tree_flatten(0)[1]])


def output_values(node: fx.Node) -> list[Any]:
    """The program's outputs in order."""
    return list(node.args[0])  # type: ignore[arg-type]
