"""`SparseAttention`: the base of every method that lets each query read few keys.

A method is a frozen dataclass with one function on plain tensors, `index`, or `attend` where attention is more than an
index.  The compiler traces it and splices it in at the attention of every chosen layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import kernels as kernels  # registers the ops
from ..attention_index import AttentionIndex, Heads
from ..errors import BadParameter
from ..graph import Site, TokenGraph
from ..kernels.rows import take_rows
from ..op import OPS
from ..rewrite import Options, Pass, Result
from .layer_choice import chosen_layers, read_heads, read_layers

UNDERSTOOD = ("full", "padding", "causal", "window")  # kinds of mask that `Heads` can say whole


def window_of(site: Site) -> int | None:
    """How near a key must be to be seen, as `Heads` has it: 0 without a window; None where both sides differ."""
    before, after = site.mask.window or (None, None)
    if site.mask.kind != "window":
        return 0
    alike = before is not None and after == (0 if site.hides_later else before)
    return before + 1 if alike and before is not None else None


def arguments(index: AttentionIndex, heads: Heads) -> list[Any]:
    """Those of block_sparse_attention and its kin for the attention of `heads` over an index."""
    keys, values = (permuted(x, index.permutation) for x in (heads.keys, heads.values))
    lists = [index.tiles, index.columns, index.permutation, heads.lengths, index.share]
    numbers = [index.rows, index.width, index.sink, index.local, index.first, index.last]
    rest = [heads.window, index.aligned] if heads.window or index.aligned else []
    return [heads.queries, keys, values, *lists, *numbers, heads.scale, heads.causal, heads.softcap, *rest]


def permuted(x: Tensor, order: Tensor | None) -> Tensor:
    """x [B, Hk, N, D] with the token that order [B, Hk, N] names at each place; as it is without an order."""
    if order is None:
        return x
    return take_rows(x.flatten(0, 1), order.flatten(0, 1).to(torch.int64)).reshape(x.shape)


@dataclass(frozen=True)
class SparseAttention(Pass):
    """Fewer keys per query in some layers; no token leaves.

    Args:
        layers: layer indices (0-based, negative from the end); all of them by default.
        heads: query heads, a list for all layers or `{layer: list}`, which names the layers too; all by default.  The
            others of a layer belong to other passes, or stay dense.
    """

    family: ClassVar[str] = "sparse"
    takes_original: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = False  # whether it also means something where tokens see later ones
    indexed: ClassVar[bool] = True  # whether `index` says all; otherwise `attend` is the method's own
    looks_ahead: ClassVar[bool] = False  # not `indexed`: whether later tokens change what a causal query gets
    moves: ClassVar[bool] = False  # whether it asks for queries or keys at positions of other tokens
    asked_by: ClassVar[str] = ""  # the file that an instance comes from, for errors; no parameter

    layers: Any = field(default=None, kw_only=True)
    heads: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", read_layers(self.layers, self.name))
        object.__setattr__(self, "heads", read_heads(self.heads, self.name))
        if isinstance(self.heads, dict):
            self.require(layers=("left out where heads names the layers", self.layers is None))

    def index(self, heads: Heads) -> AttentionIndex:
        """Decide which keys each query reads.  Traced: plain torch, no branch on data."""
        raise NotImplementedError(f"{self.name} has no index")

    def attend(self, heads: Heads) -> Tensor:
        """The attention's result [B, H, N, D]; traced; a method that is not `indexed` has its own."""
        return torch.ops.tamis.block_sparse_attention(*arguments(self.index(heads), heads))

    @classmethod
    @abstractmethod
    def full(cls, tokens: int) -> SparseAttention:
        """The method with so large a budget that attention over at most `tokens` tokens is dense."""

    @classmethod
    def takes_windows(cls) -> bool:
        """Whether it reads within a window of the model's own; a method whose attention is its own does not."""
        return cls.indexed and cls.attend is SparseAttention.attend

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        return "reads the keys of its index"

    @property
    def titled(self) -> str:
        """What errors about the model call it: its name, and the file that asks for it."""
        return f"{self.name} of {self.asked_by}" if self.asked_by else self.name

    def require(self, **rules: tuple[str, bool]) -> None:
        """Raise BadParameter for the first parameter, by name, whose rule (a sentence) does not hold."""
        for name, (rule, holds) in rules.items():
            if not holds:
                got = repr(getattr(self, name))
                raise BadParameter(where=self.name, name=name, rule=rule, got=got, hint="see --list-passes.")

    def why_not(self, graph: TokenGraph) -> str:
        """Why this method cannot run on the graph; "" when it can."""
        if not graph.layers:
            return "no token stream was found"
        made = {op.call for op in OPS.values() if not op.captured}
        captured = {site.node for site in graph.sites}
        if any(node.target in made and node.name not in captured for node in graph.graph.nodes):
            return "the model was rewritten before; sparse attention takes an original and no token reduction"
        reasons = [self.why_not_at(graph.sites[layer.site]) for layer in graph.layers]
        return f"{reasons[0]}{_beside(graph)}" if all(reasons) else ""

    def why_not_at(self, site: Site) -> str:
        """Why the method cannot run at one attention site; "" when it can."""
        if site.role != "stream":
            return site.reason or f"its attention is no self-attention of the stream ({site.role})"
        if site.cached:
            return "attention continues a key-value cache, which the index does not cover"
        if site.mask.kind not in UNDERSTOOD:
            return "attention adds a mask or bias that is neither causal nor padding, which an index cannot say"
        window = window_of(site)
        if window is None or (window and not self.takes_windows()):
            return f"attention has a window of its own, {site.mask.window}, and the method none within it"
        rotations = (site.q_rotation, site.k_rotation)
        if self.moves and any(rotation and not rotation.tables for rotation in rotations):
            return "its rotary position embedding has no table with a row for each token to read other positions in"
        if not (site.hides_later or self.bidirectional):
            return "attention sees later tokens too, and the method is made for causal attention"
        return ""

    def apply(self, graph: TokenGraph, options: Options) -> Result:
        """Rewrite with this method alone."""
        return self.apply_together([self], graph, options)

    @classmethod
    def apply_together(cls, passes: Sequence[Pass], graph: TokenGraph, options: Options) -> Result:
        """Rewrite with all methods in one re-execution; of two that name a layer, the later one has it."""
        from .sparse_rewrite import sparsify

        return sparsify(graph, [one for one in passes if isinstance(one, SparseAttention)])

    def selected(self, layers: int) -> list[int]:
        """Layer indices this pass wants, out of `layers`; raises BadParameter for one that does not exist."""
        if isinstance(self.heads, dict):
            return chosen_layers(self.heads, layers, self.titled, "heads")
        return chosen_layers(range(layers) if self.layers is None else self.layers, layers, self.titled)

    def selected_heads(self, layer: int, layers: int, heads: int) -> list[int]:
        """Query heads of a layer this pass wants, out of `heads`; raises BadParameter for one that does not exist."""
        chosen = self.heads
        if isinstance(chosen, dict):
            chosen = chosen.get(layer) or chosen.get(layer - layers)
        every = range(heads) if chosen is None else chosen
        odd = next((head for head in every if not -heads <= head < heads), None)
        if odd is not None:
            hint = f"layer {layer} has {heads} query heads."
            raise BadParameter(where=self.titled, name="heads", rule=f"between 0 and {heads - 1}", got=odd, hint=hint)
        return sorted({head % heads for head in every})


def _beside(graph: TokenGraph) -> str:
    """What attention there is beside the stream's, for a reason: "" where there is none."""
    others = [site for site in graph.sites if site.role != "stream"]
    if not others:
        return ""
    roles = sorted({"cross-attention" if site.role == "cross" else "attention of another stream" for site in others})
    return (
        f"; beside it is {' and '.join(roles)} ({', '.join(s.module or s.node for s in others)}), which no pass takes"
    )
