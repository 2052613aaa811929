"""Reading and making nodes of an exported graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

try:
    from torch._dispatch.python import enable_python_dispatcher
except ImportError:  # it is not torch's public interface
    from contextlib import nullcontext as enable_python_dispatcher  # type: ignore[assignment]

RESHAPES = {"aten.reshape", "aten.view", "aten._unsafe_view"}
MOVES = {"aten.transpose", "aten.permute", "aten.swapaxes"}


def op_of(node: Any) -> str:
    """`aten.softmax` without its overload; "" for what is no torch op."""
    packet = getattr(getattr(node, "target", None), "overloadpacket", None)
    return str(packet) if packet is not None else ""


def expression(size: Any) -> Any:
    """A size as a number or a symbolic expression, which compare without adding a guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def same_shape(a: Any, b: Any) -> bool:
    """Whether two shapes are equal for every size of the dynamic dimensions."""
    return len(a) == len(b) and all(expression(x) == expression(y) for x, y in zip(a, b, strict=True))


def axis_order(node: fx.Node) -> list[int]:
    """For a node that moves axes: its axis i is axis order[i] of its argument."""
    rank = node.meta["val"].dim()
    if op_of(node) == "aten.permute":
        return [axis % rank for axis in node.args[1]]  # type: ignore[union-attr]
    order = list(range(rank))
    a, b = (axis % rank for axis in node.args[1:3])  # type: ignore[operator]
    order[a], order[b] = b, a
    return order


def new_node(
    like: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, name: str | None = None
) -> fx.Node:
    """A node at the graph's insertion point with the provenance of `like` and a value by the op's shape rule."""
    node = like.graph.create_node("call_function", target, args, kwargs or {}, name)
    node.meta = {key: value for key, value in like.meta.items() if key != "val"}
    values, options = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = next(m for n in node.graph.nodes if (m := getattr(n.meta.get("val"), "fake_mode", None)) is not None)
    # guards stay with a program and tie its sizes; torch 2.11 decomposes a matmul of symbolic sizes in Python alone
    with mode, enable_python_dispatcher(), mode.shape_env.suppress_guards():
        node.meta["val"] = target(*values, **options)
    return node
