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

from ...errors import MissingDependency
from ...op import Op
from .launch import Twin


def twin_of(op: Op) -> Twin | None:
    """How the op runs on a GPU; None where it has no kernels and its reference is inlined there too.

    Raises:
        MissingDependency: see `need_triton`.
    """
    if op.triton is None:
        return None
    need_triton()
    return importlib.import_module(f".{op.triton}", __name__).TWIN


def need_triton() -> None:
    """Where Triton does not install, tamis does all but this.

    Raises:
        MissingDependency: Triton is not installed.
    """
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name != "triton":  # it is there, and something it needs is not
            raise
        raise MissingDependency(
            what="compiling or running kernels for a GPU", package="triton", install="triton"
        ) from error
