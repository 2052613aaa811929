"""Finding the attention sites of a canonical graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ..graph import Mask, Site, module_path, source_line
from .masks import MaskReader

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def find_sites(program: ExportedProgram) -> tuple[Site, ...]:
    """Every scaled_dot_product_attention node in order, with its mask's kind; roles are found with the stream."""
    reader = MaskReader(program)
    nodes = [node for node in program.graph.nodes if node.target is SDPA]
    return tuple(_site(index, node, reader) for index, node in enumerate(nodes))


def attention_argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument of attention by position or keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _site(index: int, node: fx.Node, reader: MaskReader) -> Site:
    q, k, v = node.args[:3]
    heads, head_dim = (int(q.meta["val"].shape[axis]) if q.meta["val"].dim() == 4 else 1 for axis in (1, 3))  # type: ignore[union-attr]
    if q.meta["val"].dim() != 4:  # type: ignore[union-attr]
        head_dim = int(q.meta["val"].shape[-1])  # type: ignore[union-attr]
    scale = attention_argument(node, 6, "scale", None)
    mask = attention_argument(node, 3, "attn_mask", None)
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
        causal=bool(attention_argument(node, 5, "is_causal", False)),
        mask=reader.read(mask) if mask is not None else Mask(),
        role="other",
        module=module_path(node),
        source=source_line(node),
    )
