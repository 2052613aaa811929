"""What a sparse attention method sees (`Heads`) and what it answers (`AttentionIndex`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SHARES = ("layer", "kv", "query")


@dataclass(frozen=True)
class AttentionIndex:
    """Which keys every query reads: the one currency of sparse attention.

    Queries come in rows of `rows` neighbours that share a list, R = ceil(N / rows) of them.  A query reads, of what
    causality lets it see, its row's tiles and columns, the first `sink` keys, and the keys less than `local` tokens
    away; the first `first` and the last `last` tokens read every key.  All places count real tokens only.

    A method may lay the keys and values out in another order, so that those read together lie together: tiles and
    columns then name places in that order, while causality, sinks, `local`, and padding go by tokens as ever.

    tiles    [B, S, R, T]  int32  first key of tiles `width` keys wide, anywhere but not overlapping; -1: unused
    columns  [B, S, R, C]  int32  single keys outside the tiles; -1: unused
    aligned  whether every tile starts at a multiple of `width`; compiled for a CPU, such tiles are read in place
    share    who has a list of its own: "layer" (S = 1), "kv" (S = key heads), "query" (S = query heads)
    permutation    [B, Hk, N]  int32 or int64  the token whose key is put at each place; None: keys stay in order
    """

    rows: int
    width: int = 1
    tiles: Tensor | None = None
    columns: Tensor | None = None
    share: str = "layer"
    sink: int = 0
    local: int = 0
    first: int = 0
    last: int = 0
    permutation: Tensor | None = None
    aligned: bool = False


@dataclass(frozen=True)
class Heads:
    """One attention site as a method sees it.  B batch, H query heads, Hk key heads, N tokens, D head size.

    queries, keys, values  as attention used them (rotated), real tokens first in every row
    lengths                [B] int64 real tokens of each row; None: N
    layer, layers          0-based index of the layer, and their number
    weights                tensors of a trained method, float32, by name
    window                 keys so many tokens away, and farther, are seen by nobody; 0: there is no such window
    """

    queries: Tensor  # [B, H, N, D]
    keys: Tensor  # [B, Hk, N, D]
    values: Tensor  # [B, Hk, N, D]
    lengths: Tensor | None
    scale: float
    causal: bool
    softcap: float | None
    layer: int
    layers: int
    window: int = field(default=0, kw_only=True)
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _before_rope: Callable[[], Tensor] | None = field(default=None, repr=False)
    _rotate: Callable[[str, Tensor], Tensor | None] | None = field(default=None, repr=False)

    @cached_property
    def keys_before_rope(self) -> Tensor:
        """[B, Hk, N, D] before rotary position embedding; `keys` in models without it."""
        return self.keys if self._before_rope is None else self._before_rope()

    def queries_at(self, places: Tensor) -> Tensor:
        """[B, H, N, D] queries rotated to the positions of other tokens; `queries` in models without rotary embedding.

        places  [N] int64 whose position each query gets, by its place among the real tokens; or [1]: one for all
        """
        rotated = None if self._rotate is None else self._rotate("queries", places)
        return self.queries if rotated is None else rotated

    def keys_at(self, places: Tensor) -> Tensor:
        """[B, Hk, N, D] keys rotated to the positions of other tokens, as `queries_at`.

        Only distances count under a rotation, so keys at the place of the first token are as good as un-rotated ones.
        """
        rotated = None if self._rotate is None else self._rotate("keys", places)
        return self.keys if rotated is None else rotated

    @property
    def tokens(self) -> Any:
        """N, an int or a SymInt."""
        return self.queries.shape[2]

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return int(self.queries.shape[1]) // int(self.keys.shape[1])

    def of(self, chosen: Sequence[int]) -> Heads:
        """Some query heads, ascending, with their key heads: one for each group that is whole, else one for each."""
        own = key_heads(chosen, self.group)

        def rotate(what: str, places: Tensor) -> Tensor | None:
            rotated = None if self._rotate is None else self._rotate(what, places)
            return None if rotated is None else some_heads(rotated, chosen if what == "queries" else own)

        return replace(
            self,
            queries=some_heads(self.queries, chosen),
            keys=some_heads(self.keys, own),
            values=some_heads(self.values, own),
            _before_rope=lambda: some_heads(self.keys_before_rope, own),
            _rotate=rotate,
        )


def key_heads(chosen: Sequence[int], group: int) -> list[int]:
    """Key heads of some query heads: each once where they are whole groups, else one for every query head."""
    own = [head // group for head in chosen]
    whole = list(dict.fromkeys(own))
    return whole if len(whole) * group == len(own) else own


def some_heads(x: Tensor, chosen: Sequence[int], axis: int = 1) -> Tensor:
    """The chosen ones along an axis of x, in their order; x itself when they are all of it."""
    from torch import cat

    runs = [[chosen[0], chosen[0] + 1]]
    for head in chosen[1:]:
        if head == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([head, head + 1])
    if runs == [[0, x.shape[axis]]]:
        return x
    parts = [x.narrow(axis, start, stop - start) for start, stop in runs]
    return parts[0] if len(parts) == 1 else cat(parts, axis)
