"""`Guard`: at sizes where the result does not pay, the original runs.

Below a number of tokens that is known, nothing is measured.  Otherwise:

What a size costs is measured when it first comes, original against result in turn, and remembered.  Sizes that follow
from those measured are not measured again: what is faster with a batch of 8 is faster with 16 of the same images, and
what is slower with 40 tokens is slower with 20.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..report import Benchmark

if TYPE_CHECKING:
    from .compiled import CompiledModel

Sizes = tuple[int, ...]
REPEATS = 5
CLEAR = 0.05  # by how much a size must be faster or slower to speak for others: less may be chance


class Guard:
    """Decides by size which of two callables runs.

    below     calls of fewer tokens, padding included, run the original; 0: none does for that
    measured  by size, smallest first: what was timed there;  `str()` says where the break-even lies
    """

    def __init__(
        self,
        measure: Callable[..., Benchmark] | None,
        below: int = 0,
        tokens: Callable[[Any], int | None] = lambda call: None,
    ) -> None:
        """`measure(*args, **kwargs)` times both on a call's inputs, None: nothing is; `tokens(call)` are in a call."""
        self._measure = measure
        self._tokens = tokens
        self.below = below
        self.measured: dict[Sizes, Benchmark] = {}

    @staticmethod
    def of(model: CompiledModel, never_slower: bool) -> Guard | None:
        """The guard of a model, as `never_slower` and its recipe say; None where it needs none or has no original."""
        from .break_even import tokens_in

        below = int(model.recipe.options.get("dense_below", 0))
        if model.original is None or not (never_slower or below):
            return None
        return Guard(model.benchmark if never_slower else None, below, tokens_in(model.original))

    @staticmethod
    def again(model: CompiledModel) -> Guard | None:
        """The guard of a model whose original, recipe or device is another now: what was timed says nothing now."""
        return Guard.of(model, model.guard is not None and model.guard._measure is not None)

    def prefers_result(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
        """Whether the result is at least as fast as the original at the sizes of a call; may time both, once."""
        if self.below and (tokens := self._tokens(call)) is not None and tokens < self.below:
            return False
        sizes = sizes_of(call)
        if self._measure is None or 0 in sizes:
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
        below = [f"the original runs below {self.below} tokens"] if self.below else []
        return "; ".join([*below, *([] if self._measure is None else [self._timed()])])

    def _timed(self) -> str:
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
