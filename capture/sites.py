"""Finding the attention sites of a canonical graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ..graph import Site, module_path, source_line
from ..kernels.attention import ATTENTION
from ..kernels.quantized_attention import QUANTIZED_ATTENTION
from .masks import MaskReader

SDPA = torch.ops.aten.scaled_dot_product_attention.default
OWN = ATTENTION.call
ROUNDED = QUANTIZED_ATTENTION.call
NAMES = {
    SDPA: {"mask": "attn_mask", "causal": "is_causal"},
    OWN: {},
    ROUNDED: {},
}  # what the ops call the arguments of attention


def find_sites(program: ExportedProgram) -> tuple[Site, ...]:
    """Every attention node in order, with its mask's kind; roles are found with the stream.

    Attention with a bias per key is that of a stream that was reduced before; it is no site.
    """
    reader = MaskReader(program)
    nodes = [node for node in program.graph.nodes if node.target in NAMES and not attention_argument(node, "key_bias")]
    return tuple(_site(index, node, reader) for index, node in enumerate(nodes))


def attention_parameter(node: fx.Node, name: str) -> tuple[int, str, Any] | None:
    """Place, own name and default of a parameter of attention (`mask`, `causal`, `scale`, `softcap`, ...), if any."""
    own = NAMES[node.target].get(name, name)
    parameters = enumerate(node.target._schema.arguments)  # type: ignore[union-attr]
    return next(((at, one.name, one.default_value) for at, one in parameters if one.name == own), None)


def attention_argument(node: fx.Node, name: str) -> Any:
    """What an attention node is given for a parameter; None where its op has none."""
    parameter = attention_parameter(node, name)
    if parameter is None:
        return None
    at, own, default = parameter
    return node.args[at] if len(node.args) > at else node.kwargs.get(own, default)


def set_attention_argument(node: fx.Node, name: str, value: Any) -> None:
    """Give an attention node another value for a parameter that its op has."""
    parameter = attention_parameter(node, name)
    assert parameter is not None
    at, own, _ = parameter
    if len(node.args) > at:
        node.update_arg(at, value)
    else:
        node.update_kwarg(own, value)


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
