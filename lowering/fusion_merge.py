"""Merging, reducing and dropping tokens as one pass with the residual add before and the norm after.

    %t = add(%x, %branch)                           or  add(%x, mul(%branch, %gamma))
    %m = tamis.merge_tokens(%t, slot, leader, moved, weight, spare)
    %y = %m[0];  %mass = %m[1]                      or  where(%valid, %m[1], 0)
    %n = layer_norm(%y, [C], gamma, beta, eps)      or  rms_norm
    %bias = log(%mass)                                       ->  %y, %n, %mass, %bias = tamis.add_reduce_norm(...)

Each part is taken where it is there, and a sum only where nothing else reads it: otherwise it is computed in any case.
A norm before the cut (a post-norm block) stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.add_reduce_norm import ADD_REDUCE_NORM
from ..kernels.merge_tokens import MERGE_TOKENS
from ..kernels.reduce_tokens import REDUCE_TOKENS
from .fusion import Fired, insert_op
from .splice import op_of

name = "merge"
aten = torch.ops.aten


@dataclass
class _Chain:
    """What is fused around one reduction: the arguments of the fused op, and the nodes that its results replace.

    node      the reduction;  y, mass  the nodes that are its results
    parts     the ops in the chain, in order;  missing  what is not in it, and why
    replaced  by the place of the result
    """

    node: fx.Node
    tokens: fx.Node
    plan: tuple[Any, ...]
    mean: bool
    y: list[fx.Node]
    mass: list[fx.Node]
    parts: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    added: fx.Node | None = None
    scale: fx.Node | None = None
    valid: fx.Node | None = None
    norm: tuple[Any, ...] = ("", None, None, 0.0)
    replaced: dict[int, list[fx.Node]] = field(default_factory=dict)

    @staticmethod
    def at(node: fx.Node) -> _Chain:
        x, slot, leader, moved, weight, last = node.args
        if op_of(node) is REDUCE_TOKENS:
            return _Chain(node, x, (slot, leader, moved, weight), bool(last), [node], [])
        y, mass = ([user for user in node.users if user.args[1] == place] for place in range(2))
        return _Chain(node, x, (slot, leader, moved, weight), True, y, mass)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.tokens, self.added, self.scale, *self.plan, self.valid, self.mean, *self.norm


def apply(graph: fx.Graph) -> list[Fired]:
    """Fuse around every merge_tokens and reduce_tokens."""
    return [_fuse(_Chain.at(node)) for node in graph.nodes if op_of(node) in (MERGE_TOKENS, REDUCE_TOKENS)]


def _fuse(chain: _Chain) -> Fired:
    chain.replaced[0] = chain.y
    _take_sum(chain)
    chain.parts.append(_op_name(chain.node))
    _take_norm(chain)
    _take_masses(chain)
    if reason := _why_not(chain):
        chain.parts, chain.missing = [], [reason]
    elif len(chain.parts) == 1:
        chain.parts = []
    fired = Fired.at(chain.node, name, chain.parts, chain.missing)
    if fired.fired:
        _replace(chain)
    return fired


def _why_not(chain: _Chain) -> str:
    """Why the kernel does not serve the chain."""
    from ..kernels.triton.reduce_norm import TWIN

    return TWIN.why_not(*fx.map_arg(chain.arguments, lambda node: node.meta["val"]))


def _replace(chain: _Chain) -> None:
    for place, result in enumerate(insert_op(ADD_REDUCE_NORM, chain.arguments, chain.node)):
        for old in chain.replaced.get(place, ()):
            old.replace_all_uses_with(result)
        if not result.users:
            chain.node.graph.erase_node(result)


def _take_sum(chain: _Chain) -> None:
    """An add of two tensors of tokens, one perhaps scaled per feature, that only the reduction reads."""
    total = chain.tokens
    if not _is(total, aten.add.Tensor) or total.kwargs or not all(_alike(one, total) for one in total.args):
        return chain.missing.append(f"no residual add: the tokens are {total.name}")
    if others := [user.name for user in total.users if user is not chain.node]:
        return chain.missing.append(f"the residual add {total.name} is read by {', '.join(others)} too")
    chain.tokens, chain.added = total.args  # type: ignore[assignment]
    chain.parts.append("add")
    for stream, scaled in (total.args, total.args[::-1]):
        for branch, gamma in _factors(scaled):
            if len(scaled.users) == 1 and _alike(branch, total) and _per_feature(gamma, total):
                chain.tokens, chain.added, chain.scale = stream, branch, gamma
                chain.parts.insert(0, "mul")
                return None
    return None


def _factors(node: Any) -> tuple[tuple[Any, Any], ...]:
    return (node.args, node.args[::-1]) if _is(node, aten.mul.Tensor) else ()


def _take_masses(chain: _Chain) -> None:
    """The new sizes with those of empty slots blanked, and their logarithm, which is the bias of the next attention."""
    readers = [user for mass in chain.mass for user in mass.users]
    if len(readers) == 1 and (valid := _blanked(readers[0])) is not None and valid < chain.node:
        chain.valid, chain.mass, readers = valid, readers, list(readers[0].users)
        chain.parts.append("where")
    logs = [user for user in readers if _is(user, aten.log.default)]
    chain.replaced |= {2: chain.mass, 3: logs}
    chain.parts += ["log"] * bool(logs)


def _blanked(node: fx.Node) -> Any:
    """The condition of `where(condition, mass, 0)`, of the same shape; else None."""
    if not _is(node, aten.where.ScalarOther) or node.args[2] != 0:
        return None
    condition, mass = node.args[:2]
    return condition if isinstance(condition, fx.Node) and _shape(condition) == _shape(mass) else None


def _take_norm(chain: _Chain) -> None:
    """The first norm over the features that reads the reduced tokens."""
    readers = [user for y in chain.y for user in y.users]
    for user in readers:
        if norm := _norm(user, chain.y):
            if any(isinstance(one, fx.Node) and not one < chain.node for one in norm):
                return chain.missing.append(f"the weights of {user.name} are computed later")
            chain.norm, chain.replaced[1] = norm, [user]
            return chain.parts.append(_op_name(user))
    reading = ", ".join(user.name for user in readers) or "nothing"
    return chain.missing.append(f"no norm after it: the tokens go to {reading}")


def _norm(node: fx.Node, y: list[fx.Node]) -> tuple[Any, ...] | None:
    """norm, weight, bias and eps of a norm of y over its features; None where the node is something else."""
    if not (_is(node, aten.layer_norm.default) or _is(node, aten.rms_norm.default)) or node.args[0] not in y:
        return None
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    by_place = {one.name: value for one, value in zip(schema, node.args, strict=False)}
    given = {**{one.name: one.default_value for one in schema}, **by_place, **node.kwargs}
    if len(given["normalized_shape"]) != 1 or given["eps"] is None:
        return None
    kind = "layer" if _is(node, aten.layer_norm.default) else "rms"
    return kind, given["weight"], given.get("bias"), given["eps"]


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _op_name(node: fx.Node) -> str:
    return str(node.target.__name__).split(".")[0]  # type: ignore[union-attr]


def _alike(one: Any, other: fx.Node) -> bool:
    """Whether two nodes are tensors [B, N, C] of one type."""
    value, like = one.meta["val"] if isinstance(one, fx.Node) else None, other.meta["val"]
    return isinstance(value, Tensor) and value.dtype == like.dtype and _shape(one) == _shape(other)


def _per_feature(one: Any, tokens: fx.Node) -> bool:
    return isinstance(one, fx.Node) and _shape(one) == _shape(tokens)[-1:]


def _shape(node: Any) -> tuple[str, ...]:
    """Sizes as text: to compare symbols would record a guard."""
    return tuple(map(str, node.meta["val"].shape))
