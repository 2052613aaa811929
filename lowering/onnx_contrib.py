"""What of a program has a form on ONNX Runtime's own operators, and what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ..kernels.block_sparse_attention import fake
from ..kernels.onnx_grouped_query import dense_grouped_query
from ..op import OnnxCall
from .splice import fake_mode_of, op_of, without_guards

DENSE = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Form:
    """One node: the function on ONNX Runtime's own operators that a file calls for it, or why there is none.

    function  its name; "" where the file has standard operators
    reason    why it has; "" where it has not
    """

    node: fx.Node
    function: str
    reason: str


def own_form(node: fx.Node) -> Callable[..., OnnxCall | str] | None:
    """What answers, for a node's arguments, with its form or why it has none; None where standard operators do."""
    op = op_of(node)
    if op is not None:
        return op.contrib
    return dense_grouped_query if node.target is DENSE else None


def attention_like(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """Shape rule of the forms of attention."""
    return fake(q, k, v)


def contrib_forms(program: ExportedProgram) -> list[Form]:
    """The forms of a program's nodes in order, as `export_onnx` with `contrib` writes them."""
    found = []
    with without_guards(fake_mode_of(program.graph)):
        for node in program.graph.nodes:
            form = own_form(node)
            if form is not None:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: one.meta["val"])
                made = form(*args, **kwargs)
                found.append(Form(node, "", made) if isinstance(made, str) else Form(node, made.name, ""))
    return found
