"""Merging, reducing and dropping tokens as one pass with the residual add before and the norm after.

    %t = add(%x, %branch)                           or  add(%x, mul(%branch, %gamma))
    %m = tamis.merge_tokens(%t, slot, leader, moved, weight, spare)
    %y = %m[0];  %mass = %m[1]                      or  where(%valid, %m[1], 0)
    %n = layer_norm(%y, [C], gamma, beta, eps)      or  rms_norm
    %bias = log(%mass)                                       ->  %y, %n, %mass, %bias = tamis.add_reduce_norm(...)

In a post-norm block the norm stands between the add and the reduction.  Each part is taken where it is there, a sum and
a norm before the reduction only where nothing else reads them: otherwise they are computed in any case.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.add_reduce_norm import ADD_REDUCE_NORM
from ..kernels.merge_tokens import MERGE_TOKENS
from ..kernels.reduce_tokens import REDUCE_TOKENS
from ..op import all_arguments
from .fusion import Fired, insert_op
from .splice import op_of

name = "merge"
aten = torch.ops.aten
NORMS = {aten.layer_norm.default: "layer", aten.rms_norm.default: "rms"}
SIZES = (aten.sym_size.int, torch.ops.tamis.token_count.default)  # read no value, only how many there are


@dataclass
class _Chain:
    """What is fused around one reduction: the arguments of the fused op, and the nodes that its results replace.

    node      the reduction;  y, mass  the nodes that are its results
    parts     the ops in the chain, in order;  missing  what is not in it, and why
    passed    nodes that the reduction no longer reads;  replaced  nodes by the place of the result
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
    norm_first: bool = False
    passed: list[fx.Node] = field(default_factory=list)
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
        return self.tokens, self.added, self.scale, *self.plan, self.valid, self.mean, *self.norm, self.norm_first


def apply(graph: fx.Graph) -> list[Fired]:
    """Fuse around every merge_tokens and reduce_tokens."""
    return [_fuse(_Chain.at(node)) for node in graph.nodes if op_of(node) in (MERGE_TOKENS, REDUCE_TOKENS)]


def _fuse(chain: _Chain) -> Fired:
    chain.replaced[0] = chain.y
    reader = _take_norm_before(chain)
    _take_sum(chain, reader)
    chain.parts.append(_op_name(chain.node))
    if not chain.norm_first:
        _take_norm_after(chain)
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
    for node in chain.passed:
        for user in [user for user in node.users if user.target in SIZES]:
            user.replace_input_with(node, chain.tokens)
    for place, result in enumerate(insert_op(ADD_REDUCE_NORM, chain.arguments, chain.node)):
        for old in chain.replaced.get(place, ()):
            old.replace_all_uses_with(result)
        if not result.users:
            chain.node.graph.erase_node(result)


def _take_norm_before(chain: _Chain) -> fx.Node:
    """A norm that only the reduction reads; what reads the tokens before it: the norm, or the reduction."""
    node = chain.tokens
    if (norm := _norm(node)) is None:
        return chain.node
    if others := _others(node, chain.node):
        chain.missing.append(f"the norm {node.name} is read by {others} too")
        return chain.node
    chain.norm, chain.norm_first, chain.tokens = norm, True, node.args[0]  # type: ignore[assignment]
    chain.parts.append(_op_name(node))
    chain.passed.append(node)
    return node


def _take_sum(chain: _Chain, reader: fx.Node) -> None:
    """An add of two tensors of tokens, one perhaps scaled per feature, that only `reader` reads."""
    total = chain.tokens
    if not _is(total, aten.add.Tensor) or total.kwargs or not all(_alike(one, total) for one in total.args):
        return chain.missing.append(f"no residual add: the tokens are {total.name}")
    if others := _others(total, reader):
        return chain.missing.append(f"the residual add {total.name} is read by {others} too")
    chain.passed.append(total)
    chain.tokens, chain.added = total.args  # type: ignore[assignment]
    chain.parts.insert(0, "add")
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


def _take_norm_after(chain: _Chain) -> None:
    """The first norm over the features that reads the reduced tokens."""
    readers = [user for y in chain.y for user in y.users]
    for user in readers:
        if user.args[0] in chain.y and (norm := _norm(user)):
            if any(isinstance(one, fx.Node) and not one < chain.node for one in norm):
                return chain.missing.append(f"the weights of {user.name} are computed later")
            chain.norm, chain.replaced[1] = norm, [user]
            return chain.parts.append(_op_name(user))
    reading = ", ".join(user.name for user in readers) or "nothing"
    return chain.missing.append(f"no norm after it: the tokens go to {reading}")


def _norm(node: fx.Node) -> tuple[Any, ...] | None:
    """norm, weight, bias and eps of a norm over the features; None where the node is something else."""
    if node.op != "call_function" or node.target not in NORMS:
        return None
    names = [one.name for one in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, all_arguments(node.target, node.args, node.kwargs), strict=True))
    if len(given["normalized_shape"]) != 1 or given["eps"] is None:
        return None
    return NORMS[node.target], given["weight"], given.get("bias"), given["eps"]  # type: ignore[index]


def _others(node: fx.Node, reader: fx.Node) -> str:
    """Names of what else reads the values of a node."""
    return ", ".join(user.name for user in node.users if user is not reader and user.target not in SIZES)


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
