"""`Guard`: at sizes where fewer tokens do not pay, the original runs.

What a size costs is measured when it first comes, original against result in turn, and remembered.  Sizes that follow
from those measured are not measured again: what is faster with a batch of 8 is faster with 16 of the same images, and
what is slower with 40 tokens is slower with 20.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..report import Benchmark

Sizes = tuple[int, ...]
REPEATS = 5
CLEAR = 0.05  # by how much a size must be faster or slower to speak for others: less may be chance


class Guard:
    """Decides by size which of two callables runs.

    measured  by size, smallest first: what was timed there;  `str()` says where the break-even lies
    """

    def __init__(self, measure: Callable[..., Benchmark]) -> None:
        """`measure(*args, **kwargs)` times both on a call's inputs."""
        self._measure = measure
        self.measured: dict[Sizes, Benchmark] = {}

    def prefers_result(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
        """Whether the result is at least as fast as the original at the sizes of a call; may time both, once."""
        sizes = sizes_of(call)
        if 0 in sizes:
            return True  # nothing to time
        known = self._known(sizes)
        if known is not None:
            return known
        found = self._measure(*call[0], repeats=REPEATS, **call[1])
        self.measured = dict(sorted([*self.measured.items(), (sizes, found)]))
        return found.speedup >= 1

    def _known(self, sizes: Sizes) -> bool | None:
        for measured, found in self.measured.items():
            pays = found.speedup >= 1
            if measured != sizes and abs(found.speedup - 1) < CLEAR:
                continue
            small, large = (measured, sizes) if pays else (sizes, measured)
            if len(small) == len(large) and all(a <= b for a, b in zip(small, large, strict=True)):
                return pays
        return None

    def __str__(self) -> str:
        slow = [found for found in self.measured.values() if found.speedup < 1]
        fast = [found for found in self.measured.values() if found.speedup >= 1]
        if not self.measured:
            return "never slower: nothing was measured yet"
        if not slow:
            return f"never slower: the result runs from {fast[0].shapes} on ({fast[0].speedup:.2f}x there)"
        word = f"the original runs up to {slow[-1].shapes} ({slow[-1].speedup:.2f}x)"
        return f"never slower: {word}" + (
            f", the result from {fast[0].shapes} on ({fast[0].speedup:.2f}x)" if fast else ""
        )


def sizes_of(call: Any) -> Sizes:
    """Every size of every tensor of a call, in order."""
    return tuple(size for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) for size in leaf.shape)
