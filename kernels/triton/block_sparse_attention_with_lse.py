"""`block_sparse_attention_with_lse` by the kernel of block_sparse_attention, which has it at hand: one store more."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from ..sparse_pairs import Pairs
from . import block_sparse_attention
from .architecture import Architecture
from .block_sparse_attention import launched, refuses
from .launch import Twin, Work


def work(architecture: Architecture, q: Tensor, k: Tensor, v: Tensor, *index: Any) -> Work:
    """The launches of block_sparse_attention."""
    launches, out, lse = launched(architecture, q, k, v, *Pairs.of(*index), lse=True)
    return launches, (out, lse)


def examples() -> Iterator[tuple[Any, ...]]:
    """A Llama's prompt: tiles of a group."""
    yield from islice(block_sparse_attention.examples(), 1)


TWIN = Twin(work, examples, refuses)
