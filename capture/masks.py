"""What a mask does, found by evaluating the nodes that build it, not by their pattern.

The cone of nodes above a mask (two dozen arange and index nodes in HF models, other ones in every release) is run at a
few lengths and paddings and the result is compared with what each kind of mask would be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ..graph import Mask

HIDDEN = -1e4  # an additive mask at or below this hides a key; half types' minimum is -65504
TRIALS = (("none", 6), ("right", 7), ("left", 7), ("both", 9))


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
        bias = Mask("bias", node.name, additive)
        cone = ancestors(node) | {node}
        try:
            tables = [self._evaluate(node, cone, padding, length) for padding, length in TRIALS]
        except Exception:  # a cone that cannot run on made-up inputs is kept as it stands, which is always right
            return bias
        allowed = []
        for table in tables:
            if table.dim() not in (2, 4) or (additive and not bool(((table == 0) | (table <= HIDDEN)).all())):
                return bias
            allowed.append(table if not additive else table > HIDDEN)
        return _kind(allowed, node.name, additive) or bias

    def _evaluate(self, node: fx.Node, cone: set[fx.Node], padding: str, length: int) -> Tensor:
        env: dict[fx.Node, Any] = {}
        sizes: dict[str, int] = {}
        for one in self.program.graph.nodes:
            if one not in cone:
                continue
            if one.op == "placeholder":
                env[one] = self.constants.get(one.name)
                if env[one] is None:
                    env[one] = made_up_input(one, padding, length, sizes)
            else:
                args, kwargs = fx.node.map_arg((one.args, one.kwargs), lambda a: env[a])
                env[one] = one.target(*args, **kwargs)  # type: ignore[operator]
        result: Tensor = env[node]
        return result


def _constants(program: ExportedProgram) -> dict[str, Tensor]:
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found = {place: program.state_dict.get(name, program.constants.get(name)) for place, name in names.items()}
    found.update(
        {place: program.constants[name] for place, name in signature.inputs_to_lifted_tensor_constants.items()}
    )
    return {place: value for place, value in found.items() if isinstance(value, Tensor)}


def made_up_input(node: fx.Node, padding: str, length: int, sizes: dict[str, int]) -> Any:
    """A tensor like a user input: dynamic batch 3, dynamic length `length`; 0/1 integers with the given padding."""
    like = node.meta["val"]
    if not isinstance(like, Tensor):
        return like
    shape = []
    for axis, size in enumerate(like.shape):
        if isinstance(size, torch.SymInt):
            shape.append(sizes.setdefault(str(size), 3 if axis == 0 else length))
        else:
            shape.append(int(size))
    if like.is_floating_point():
        return torch.ones(shape, dtype=like.dtype, device=like.device)
    ones = torch.ones(shape, dtype=torch.int64, device=like.device)
    if len(shape) == 2 and padding != "none":
        for row in range(shape[0]):
            gap = min(row + 1, shape[1] - 1)
            if padding in ("right", "both"):
                ones[row, -gap:] = 0
            if padding == "left" or (padding == "both" and shape[1] > 2 * gap):
                ones[row, :gap] = 0
    return ones.to(like.dtype)


def _kind(tables: list[Tensor], name: str, additive: bool) -> Mask | None:
    """The kind all tables agree on; None when they fit none."""
    tables = [t if t.dim() == 4 else t[None, None] for t in tables]
    if all(bool(t.all()) for t in tables):
        return Mask("full", None, additive)
    if not all(bool((t == t[:, :1]).all()) for t in tables):
        return None
    if all(bool((t == t[:, :, :1]).all()) for t in tables):
        return Mask("padding", name, additive, padded=True)
    padded = False
    for table in tables:
        length = table.shape[-1]
        if table.shape[-2] != length:
            return None
        triangle = torch.ones(length, length, dtype=torch.bool, device=table.device).tril()
        keys = table[:, :, -1:, :]
        if not bool((table == (triangle & keys)).all()):
            return None
        padded |= not bool(keys.all())
    return Mask("causal", name, additive, padded)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that a node depends on."""
    found: set[fx.Node] = set()
    pending = list(node.all_input_nodes)
    while pending:
        one = pending.pop()
        if one not in found:
            found.add(one)
            pending.extend(one.all_input_nodes)
    return found


def user_inputs(program: ExportedProgram) -> Iterator[fx.Node]:
    """Placeholders that the user fills."""
    names = set(program.graph_signature.user_inputs)
    return (node for node in program.graph.nodes if node.op == "placeholder" and node.name in names)
