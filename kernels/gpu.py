"""Ops on CUDA tensors outside of any compiler: by their kernels where those serve the arguments, else by the reference.

Triton is imported by the first such call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.library import Library

from ..op import NAMESPACE, OPS, Op, all_arguments

_LIBRARY: list[Library] = []


def register_for_gpus() -> None:
    """Give every op that has kernels an implementation of its own for CUDA tensors."""
    if not _LIBRARY:
        _LIBRARY.append(Library(NAMESPACE, "FRAGMENT"))
        for op in OPS.values():
            if op.triton is not None:
                _LIBRARY[0].impl(op.name, _on_gpu(op), "CUDA")


def _on_gpu(op: Op) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        from .triton import twin_of
        from .triton.launch import run

        twin = twin_of(op)
        if twin is None or twin.why_not(*all_arguments(op.call, args)):
            return op.reference(*args)
        return run(twin, *args)

    return call
