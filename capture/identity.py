"""What makes two captured models the same: the graph's operations, and the weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram


def structure_hash(program: ExportedProgram) -> str:
    """sha256 of the graph (ops with all their arguments) and of the names, shapes and dtypes of its weights.

    Nodes count by their place, not by their name, and symbols by the order in which they appear.
    """
    digest = hashlib.sha256()
    place = {node: f"%{i}" for i, node in enumerate(program.graph.nodes)}
    symbols: dict[str, str] = {}

    def shown(value: Any) -> str:
        if isinstance(value, fx.Node):
            return place[value]
        if isinstance(value, list | tuple):
            return f"[{','.join(map(shown, value))}]"
        if isinstance(value, torch.SymInt):
            return symbols.setdefault(str(value), f"s{len(symbols)}")
        return repr(value)

    for node in program.graph.nodes:
        keywords = [f"{key}={shown(value)}" for key, value in sorted(node.kwargs.items())]
        # a function's text holds its address
        target = node.target if hasattr(node.target, "_schema") else getattr(node.target, "__name__", node.target)
        digest.update(f"{node.op} {target} {[*map(shown, node.args), *keywords]}\n".encode())
    for name, value in sorted(program.state_dict.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
    return digest.hexdigest()


def weights_hash(program: ExportedProgram) -> str:
    """sha256 of the bytes of all weights, buffers and constants, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted({**program.constants, **program.state_dict}.items()):
        digest.update(f"{name}\n".encode())
        if isinstance(value, Tensor) and value.device.type != "meta" and value.numel():
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
