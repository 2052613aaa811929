"""Finding the attention sites of a canonical graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ..graph import Site, module_path, source_line
from ..kernels.attention import ATTENTION
from .masks import MaskReader

SDPA = torch.ops.aten.scaled_dot_product_attention.default
OWN = ATTENTION.call
NAMES = {SDPA: {"mask": "attn_mask", "causal": "is_causal"}, OWN: {}}  # what the ops call the arguments of attention


def find_sites(program: ExportedProgram) -> tuple[Site, ...]:
    """Every attention node in order, with its mask's kind; roles are found with the stream.

    Attention with a bias per key is that of a stream that was reduced before; it is no site.
    """
    reader = MaskReader(program)
    nodes = [node for node in program.graph.nodes if node.target in NAMES and not attention_argument(node, "key_bias")]
    return tuple(_site(index, node, reader) for index, node in enumerate(nodes))


def attention_argument(node: fx.Node, name: str) -> Any:
    """An argument of an attention node (`mask`, `causal`, `scale`, `softcap`, ...); None if its op has none."""
    place = _place(node, name)
    if place is None:
        return None
    at, argument = place
    return node.args[at] if len(node.args) > at else node.kwargs.get(argument.name, argument.default_value)


def set_attention_argument(node: fx.Node, name: str, value: Any) -> None:
    """Change an argument that the node's op has."""
    place = _place(node, name)
    assert place is not None
    at, argument = place
    if len(node.args) > at:
        node.update_arg(at, value)
    else:
        node.update_kwarg(argument.name, value)


def _place(node: fx.Node, name: str) -> tuple[int, Any] | None:
    own = NAMES[node.target].get(name, name)
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    return next(((at, one) for at, one in enumerate(arguments) if one.name == own), None)


def _site(index: int, node: fx.Node, reader: MaskReader) -> Site:
    q, k, v = node.args[:3]
    heads, head_dim = (int(q.meta["val"].shape[axis]) if q.meta["val"].dim() == 4 else 1 for axis in (1, 3))  # type: ignore[union-attr]
    if q.meta["val"].dim() != 4:  # type: ignore[union-attr]
        head_dim = int(q.meta["val"].shape[-1])  # type: ignore[union-attr]
    scale = attention_argument(node, "scale")
    return Site(
        index=index,
        node=node.name,
        q=q.name,  # type: ignore[union-attr]
        k=k.name,  # type: ignore[union-attr]
        v=v.name,  # type: ignore[union-attr]
        heads=heads,
        kv_heads=int(k.meta["val"].shape[1]) if k.meta["val"].dim() == 4 else 1,  # type: ignore[union-attr]
        head_dim=head_dim,
        scale=float(scale) if isinstance(scale, int | float) else head_dim**-0.5,
        causal=bool(attention_argument(node, "causal")),
        mask=reader.read(attention_argument(node, "mask")),
        role="other",
        module=module_path(node),
        source=source_line(node),
        softcap=attention_argument(node, "softcap"),
    )
