"""Prefix tokens, class token and patch grid of a stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from .closure import ancestors
from .masks import user_inputs
from .sizes import same

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv2d.default, aten.convolution.default)


def find_prefix(program: ExportedProgram, start: fx.Node, end: fx.Node) -> tuple[int, bool]:
    """Leading tokens that must stay, and whether token 0 is a class token.

    Prefix tokens are those joined in front of the others that do not depend on the user's tensors (class, distillation
    and register tokens); and token 0 where the model reads it by position after the last layer (BERT's [CLS]).
    """
    pieces = _joined(program, start)
    prefix = _independent(program, pieces)
    first_is_single = bool(pieces) and prefix > 0 and int(pieces[0].meta["val"].shape[1]) == 1
    read = _reads_first_token(end)
    return max(prefix, int(read)), first_is_single or read


def find_grid(start: fx.Node, prefix: int) -> tuple[int, int] | None:
    """Rows and columns of the patch embedding's output, when they make up all tokens but the prefix."""
    tokens = start.meta["val"].shape[1]
    for node in ancestors(start):
        value = node.meta.get("val")
        if node.target in CONVOLUTIONS and isinstance(value, torch.Tensor):
            rows, columns = value.shape[-2:]
            if all(isinstance(x, int) for x in (rows, columns, tokens)) and rows * columns == tokens - prefix:
                return int(rows), int(columns)
    return None


def image_size(program: ExportedProgram) -> tuple[int, int] | None:
    """Rows and columns of what the first convolution makes of the model's input; None without one, or if they vary."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.target in CONVOLUTIONS and isinstance(value, torch.Tensor):
            rows, columns = value.shape[-2:]
            return (int(rows), int(columns)) if isinstance(rows, int) and isinstance(columns, int) else None
    return None


def _independent(program: ExportedProgram, pieces: list[fx.Node]) -> int:
    """How many leading tokens of the joined pieces do not depend on the user's tensors.

    A piece may itself be the front of what was joined before: DINOv2 puts its registers behind a class token that it
    cuts off again.
    """
    inputs, count = set(user_inputs(program)), 0
    for piece in pieces:
        size = piece.meta["val"].shape[1]
        if inputs & (ancestors(piece, through_sizes=False) | {piece}):
            before = [
                a for a in piece.all_input_nodes if piece.target is aten.slice.Tensor and piece.args[1:3] == (1, 0)
            ]
            known = _independent(program, _joined(program, before[0])) if before else 0
            if not isinstance(size, int) or known < size:
                return count + known
        count += int(size)
    return count


def _joined(program: ExportedProgram, node: fx.Node) -> list[fx.Node]:
    """The pieces of the concatenation along tokens that makes the stream; [] when there is none."""
    inputs = set(user_inputs(program))
    while True:
        if node.target is aten.cat.default and node.args[1:] == (1,):
            return list(node.args[0])  # type: ignore[arg-type]
        shape = node.meta["val"].shape
        above = [a for a in node.all_input_nodes if _same_tokens(a, shape)]
        above = [a for a in above if ancestors(a) & inputs or a in inputs]
        if not above:
            return []
        node = above[0]


def _same_tokens(node: fx.Node, shape: Any) -> bool:
    value = node.meta.get("val")
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 3
        and same(value.shape[1], shape[1])
        and same(value.shape[0], shape[0])
    )


def _reads_first_token(end: fx.Node) -> bool:
    """Whether token 0 of the stream's last state (through norms and slices of other axes) is read by position."""
    pending, seen = [end], set()
    while pending:
        one = pending.pop()
        for user in one.users:
            value = user.meta.get("val")
            if (user.target is aten.select.int and user.args[1:] == (1, 0)) or _takes_first(user):
                return True
            if user not in seen and isinstance(value, torch.Tensor) and value.dim() == 3:
                seen.add(user)
                pending.append(user)
    return False


def _takes_first(node: fx.Node) -> bool:
    """Whether a node cuts off the first token: `x[:, :1]`."""
    return node.target is aten.slice.Tensor and node.args[1:] in ((1, 0, 1), (1, 0, 1, 1), (1, None, 1))
