"""What a method sees (`Tokens`) and what it answers (`Plan`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .counts import CountRule

if TYPE_CHECKING:
    from torch import Tensor

Count = Any  # int, or SymInt where the token count is not known before the run


@dataclass(frozen=True)
class Plan:
    """Where every token of a cut goes: the one currency of token reduction.

    slot    [B, N]   int64   output slot of each input token; -1: dropped (or padding)
    leader  [B, N']  int64   the input token that stands for each slot: its position, mask and angle are the slot's;
                             0 at slots that are not valid
    moved   [B, E]   int64   tokens merged into a slot that another token leads, ascending; None: nothing is merged.
                             E is the largest number any row can need; unused entries repeat a leader and weigh nothing
    out              count   N'
    weight  [B, N]   float32 weight of each token in its slot's sum; None: 1
    normalize        bool    divide by the slot's weight (a mean) or not (a sum, as EViT's fused token)
    valid   [B, N']  bool    slots that hold a token; None: all do
    sizes   [B, N']  float32 original tokens in each slot; None: reduction of the sizes before (merged ones add up)
    counts_sizes     whether sizes are tracked from here on if they were not before (false: EViT knows no sizes)
    max_norm         bool    whether a merged slot is scaled to the largest norm of its tokens (MLERP); 0 stays 0
    drops            bool    whether real tokens may be dropped (slot -1 though valid), which nothing can undo
    stands           bool    whether a merged slot can stand for each of its tokens again where all are needed; a sum by
                             weights that do not add up to 1 cannot, and its tokens are then lost
    spare            bool    whether `moved` may have unused entries; without them merging costs less
    ragged           bool    whether rows may hold fewer tokens than the rule leaves: how many, `valid` alone says
    features  [B, N, C]      what the tokens are before they are reduced, instead of the stream's state; None: that
    carry  of [B, N, ...]    by name, what the method wants to see of these tokens at its next layer: Tokens.carried
    appended [B, A, C]       tokens that come in behind all others: A more slots, whose leader is the row's first token,
                             as they have no place of their own; nothing else may change then.  None: none
    grid             ints    rows, columns that the slots after the prefix fill in raster order; None: no longer a grid
    """

    slot: Tensor
    leader: Tensor
    out: Count
    moved: Tensor | None = None
    weight: Tensor | None = None
    normalize: bool = True
    valid: Tensor | None = None
    sizes: Tensor | None = None
    counts_sizes: bool = True
    max_norm: bool = False
    drops: bool = False
    stands: bool = True
    spare: bool = True
    ragged: bool = False
    features: Tensor | None = None
    carry: dict[str, Tensor] = field(default_factory=dict)
    appended: Tensor | None = None
    grid: tuple[int, int] | None = None


@dataclass
class Attention:
    """Statistics of the attention just passed, computed on demand from q and k; all but one without an N x N matrix.

    Rows are softmax(q k^T * scale + bias) in float32, with the padding, the size bias and the bias for pairs of tokens
    (relative positions) that the attention itself had; grouped heads have as many rows as there are query heads.
    Attention under a soft cap has no statistics yet.
    """

    class_row: Callable[[], Tensor]
    columns: Callable[[Tensor | None, Tensor | None], Tensor]
    picked_rows: Callable[[Tensor], Tensor]
    whole: Callable[[], Tensor]

    def cls_row(self) -> Tensor:
        """Attention of the class token (the first real token) to every token.  -> [B, H, N] float32."""
        return self.class_row()

    def received(self, weight: Tensor | None = None, among: Tensor | None = None) -> Tensor:
        """Attention every token receives: the mean over the real tokens that ask, each once.  -> [B, H, N] float32.

        weight [B, N] float32 counts each asking token so much instead; among [B, N] bool is attention as it would be
        without the other tokens: only these ask, and what one gives them adds up to 1.

        Adds up to 1 over the tokens.  Costs the product of queries and keys again, twice where the attention itself
        does not give its log-sum-exp; never a matrix on a GPU.
        """
        return self.columns(weight, among)

    def rows(self, index: Tensor) -> Tensor:
        """Attention of the tokens at index [B, R] int64 to every token.  -> [B, H, R, N] float32."""
        return self.picked_rows(index)

    def matrix(self) -> Tensor:
        """Attention of every token to every token; rows of padding are 0.  -> [B, H, N, N] float32.

        Costs memory and time of its own, the more the longer the sequence: what the other statistics were made to
        avoid.  For methods that must read it more than once.
        """
        return self.whole()


@dataclass
class Tokens:
    """The stream at a cut, as a method sees it.  Shapes: B batch, N tokens, C channels, H heads, D head size.

    Tensors that cost a graph node are made when first asked for.  `prefix` counts the protected leading *real* tokens
    of each row (under left padding the class token is not at index 0, but it is the first real token).
    """

    hidden: Tensor  # [B, N, C]
    rule: CountRule  # how many leave, in force at this layer
    out: Count  # tokens after the reduction
    prefix: int
    layer: int  # 0-based index of the layer in the model
    layers: int  # layers in the model
    sizes: Tensor | None = None  # [B, N] float32, None: all 1
    valid: Tensor | None = None  # [B, N] bool, None: no padding
    grid: tuple[int, int] | None = None  # rows, columns that the patch tokens fill in raster order; None: no grid
    lattice: tuple[int, int] | None = None  # the last grid there was, in which `places` are; None: never one
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)  # of a trained method, float32, by name
    carried: dict[str, Tensor] = field(default_factory=dict, repr=False)  # what its last plan carried, of these tokens
    memory: dict[str, Tensor] = field(default_factory=dict, repr=False)  # the method's own, from layer to layer
    _tensors: dict[str, Callable[[], Tensor]] = field(default_factory=dict, repr=False)
    _attention: Callable[[], Attention] | None = field(default=None, repr=False)

    @cached_property
    def queries(self) -> Tensor:
        """[B, H, N, D], as attention used them (after query norm and rotation)."""
        return self._tensors["queries"]()

    @cached_property
    def keys(self) -> Tensor:
        """[B, H, N, D], as attention used them (after key norm and rotation)."""
        return self._tensors["keys"]()

    @cached_property
    def keys_before_rope(self) -> Tensor:
        """[B, H, N, D], after key norm and before rotary position embedding: what `keys` are in models without it."""
        return self._tensors["keys_before_rope"]() if "keys_before_rope" in self._tensors else self.keys

    @cached_property
    def values(self) -> Tensor:
        """[B, H, N, D]."""
        return self._tensors["values"]()

    @cached_property
    def normed(self) -> Tensor:
        """[B, N, C]: the hidden state as the projections of this layer's attention read it, behind a pre-norm's norm.

        Raises AttributeError where keys are not made from it by a linear layer; see `capture.projections`.
        """
        return self._tensors["normed"]()

    @cached_property
    def positions(self) -> Tensor:
        """[B, N] int64: rank of each token's leader among the row's original real tokens."""
        return self._tensors["positions"]()

    @cached_property
    def places(self) -> Tensor:
        """[B, N] int64: place of each token's leader in the `lattice`, in raster order; below 0 in the prefix."""
        return self._tensors["places"]()

    @cached_property
    def patches(self) -> Tensor:
        """[B, N] bool: the real tokens that are not protected."""
        import torch

        if self.valid is not None:
            return self.valid & (self.valid.cumsum(1) > self.prefix)
        batch, count = self.hidden.shape[:2]
        return (torch.arange(count, device=self.hidden.device) >= self.prefix).expand(batch, count)

    @cached_property
    def source(self) -> Tensor:
        """[B, N0] int64: slot that every original token is in at this cut, -1 if it was dropped or is padding."""
        return self._tensors["source"]()

    @property
    def attention(self) -> Attention:
        """Statistics of the attention site just passed."""
        if self._attention is None:
            raise AttributeError("this cut comes before the layer's attention")
        return self._attention()
