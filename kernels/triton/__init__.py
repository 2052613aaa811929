"""tamis.kernels.triton: how ops run on a GPU.

One module per op that has kernels.  Its `TWIN` says which launches compute the op for given arguments; the launches are
the one description from which the op runs, is compiled ahead of time for a GPU that is not there, and is counted.
Nothing here is imported before a GPU target asks for it, so that tamis works where Triton does not install.
"""

from __future__ import annotations

import importlib
import os

# unset, it means fused multiply-adds now and none from Triton 3.10 on: results must not shift with an upgrade
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from ...op import Op
from .launch import Twin


def twin_of(op: Op) -> Twin | None:
    """How the op runs on a GPU; None where it has no kernels and its reference is inlined there too."""
    if op.triton is None:
        return None
    return importlib.import_module(f".{op.triton}", __name__).TWIN
