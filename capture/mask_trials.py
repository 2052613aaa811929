"""Running the nodes that build a mask on made-up inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

ORDERS = {"le", "lt", "ge", "gt", "add", "sub", "rsub", "tril", "triu", "clamp", "floor_divide", "div", "remainder"}
EQUALITIES = {"eq", "ne"}


@dataclass(frozen=True)
class Trial:
    """What the made-up inputs are like.

    padding  "none", or the side(s) on which rows are padded; row i of the batch has i + 1 padding tokens a side
    length   of every dynamic sequence
    batch    of every dynamic batch
    real, fill  what stands at real tokens and at padding, in token ids and masks alike
    """

    padding: str
    length: int
    batch: int = 3
    real: int = 1
    fill: int = 0


class NotMakeable(Exception):
    """The mask reads an input of which nothing is known that could be made up."""


class Cone:
    """A node and those above it, which can be run at any trial.

    above      the nodes that `node` depends on
    constants  parameters, buffers and constants by the name of their placeholder
    """

    def __init__(self, node: fx.Node, above: set[fx.Node], constants: dict[str, Tensor]) -> None:
        self.node, self.constants = node, constants
        self._inside = above | {node}
        self.nodes = [one for one in node.graph.nodes if one in self._inside]

    def run(self, trial: Trial) -> Tensor:
        """The node's value."""
        return self.values(trial, [self.node])[self.node]

    def values(self, trial: Trial, wanted: Collection[fx.Node]) -> dict[fx.Node, Tensor]:
        """Values of some of its nodes; what nothing needs any more is let go: tables of long sequences are large."""
        env: dict[fx.Node, Any] = {}
        sizes: dict[str, int] = {}
        waiting = {one: sum(user in self._inside for user in one.users) for one in self.nodes}
        for one in self.nodes:
            if one.op == "placeholder":
                known = self.constants.get(one.name)
                env[one] = self._made_up(one, trial, sizes) if known is None else known
            else:
                args, kwargs = fx.node.map_arg((one.args, one.kwargs), lambda a: env[a])
                env[one] = one.target(*args, **kwargs)  # type: ignore[operator]
            for used in one.all_input_nodes:
                waiting[used] -= 1
                if not waiting[used] and used not in wanted:
                    env[used] = None
        return {one: env[one] for one in wanted}

    def _made_up(self, node: fx.Node, trial: Trial, sizes: dict[str, int]) -> Any:
        value = made_up_input(node, trial, sizes)
        users = [user for user in node.users if user in self._inside]
        read = node is self.node or any(_name(user) != "sym_size" for user in users)
        if read and isinstance(value, Tensor) and (value.dim() > 2 or (value.dim() == 1 and value.is_floating_point())):
            raise NotMakeable(node.name)
        return value

    def turning_points(self) -> Iterator[int]:
        """Numbers at which a mask may change with length: those that positions are compared with or moved by, and the
        sizes of tables that were built beforehand.
        """
        for one in self.nodes:
            known = self.constants.get(one.name) if one.op == "placeholder" else None
            if known is not None and known.dim() >= 2:
                yield from known.shape
            elif known is not None and known.numel() == 1 and not known.is_floating_point():
                yield abs(int(known))
            elif _name(one) in ORDERS:
                yield from (abs(a) for a in [*one.args, *one.kwargs.values()] if type(a) is int)

    def fillers(self) -> Iterator[int]:
        """Numbers that the cone compares for equality: a padding id may be among them."""
        for one in self.nodes:
            if _name(one) in EQUALITIES:
                yield from (a for a in one.args if type(a) is int)


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return "" if packet is None else str(packet).removeprefix("aten.").rstrip("_")


def _size(size: Any, usual: int, sizes: dict[str, int]) -> int:
    """The usual size of a symbol, unless it has one; what a formula of symbols makes of theirs."""
    return int(size.subs({one: sizes.setdefault(str(one), usual) for one in size.free_symbols}))


def made_up_input(node: fx.Node, trial: Trial, sizes: dict[str, int]) -> Any:
    """A tensor like a user input at a trial; in `sizes`, which the inputs of one run share, the length of each symbol.

    Tensors [B, N] hold the trial's real and padding values, integers [B] the number of real tokens, all others ones.
    """
    like = node.meta["val"]
    if not isinstance(like, Tensor):
        return like
    shape = []
    for axis, size in enumerate(like.shape):
        if isinstance(size, torch.SymInt):
            shape.append(_size(size.node.expr, trial.batch if axis == 0 else trial.length, sizes))
        else:
            shape.append(int(size))
    kept = torch.ones(shape, dtype=torch.bool)
    if len(shape) == 2 and trial.padding != "none":
        for row in range(shape[0]):
            gap = min(row + 1, shape[1] - 1)
            if trial.padding in ("right", "both"):
                kept[row, -gap:] = False
            if trial.padding == "left" or (trial.padding == "both" and shape[1] > 2 * gap):
                kept[row, :gap] = False
    if len(shape) == 2:
        return torch.where(kept, trial.real, trial.fill).to(like.device, like.dtype)
    if len(shape) == 1 and not like.is_floating_point():
        gaps = 0 if trial.padding == "none" else torch.arange(1, shape[0] + 1)
        return (trial.length - gaps + torch.zeros(shape)).to(like.device, like.dtype)
    return torch.ones(shape, dtype=like.dtype, device=like.device)
