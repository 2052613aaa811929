"""`SubLayerReduction`: the base of methods that work on fewer tokens inside a sub-layer and on all of them outside.

Tokens are reduced at the input of a sub-layer (self-attention, cross-attention or MLP) and put back at its output,
before it is added to the residual: every merged token gets a copy of its slot's result.  The stream keeps its length,
so this works around any attention, in each of the streams of a U-Net too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import TYPE_CHECKING, Any, ClassVar

from ..counts import CountRule
from ..graph import TokenGraph
from ..rewrite import Options, Pass, Result
from ..tokens import Plan, Tokens
from .layer_choice import chosen_layers, read_layers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Place:
    """A transformer block of any stream, as a method sees it before anything runs.

    index   place of the block among all blocks of the model, which are counted by their self-attention;  blocks of them
    tokens  number of its tokens, protected ones included; a symbol where the input decides
    prefix  protected leading tokens
    image   rows and columns of what the model's first convolution makes of its input; None: there is none, or the
            input decides
    padding "none"; "known": the mask says which tokens are padding; "unknown": it depends on the input in another way
    encodes whether it is a layer of the model's deepest stream and its tokens are those of an image
    """

    index: int
    blocks: int
    tokens: Any
    prefix: int = 0
    image: tuple[int, int] | None = None
    padding: str = "none"
    encodes: bool = True

    def downsampling(self, image: tuple[int, int]) -> int | None:
        """ceil(sqrt((H*W) // T)) for T unprotected tokens: how much coarser they lie than the image [H, W]."""
        tokens = self.tokens - self.prefix
        if not isinstance(tokens, int) or tokens < 1:
            return None
        ratio = image[0] * image[1] // tokens
        return isqrt(ratio - 1) + 1 if ratio else None

    def grid(self, image: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns of the tokens if they lie on an image [H, W], evenly coarser; None if they do not."""
        step = self.downsampling(image)
        if step is None:
            return None
        rows, columns = (-(-size // step) for size in image)
        return (rows, columns) if rows * columns == self.tokens - self.prefix else None


@dataclass(frozen=True)
class SubLayerReduction(Pass):
    """Fewer tokens inside sub-layers.

    Args:
        layers: blocks (0-based, negative from the end) whose sub-layers are reduced; None: all.  Blocks are counted by
            their self-attention, through all streams.
    """

    family: ClassVar[str] = "sub-layer"
    takes_original: ClassVar[bool] = True
    from_the_first: ClassVar[bool] = False  # plans are made from what enters the first block, not each block its own

    layers: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", read_layers(self.layers, self.name))

    @property
    @abstractmethod
    def kinds(self) -> frozenset[str]:
        """Sub-layers that are reduced: "self", "cross" (attention) and "mlp"; or "block": its queries, not its keys.

        Or "layers": the chosen layers of the stream, which must follow each other, as one.
        """

    @abstractmethod
    def rule(self, place: Place) -> CountRule | str:
        """How many tokens are fewer inside the sub-layers of a block; a text: why none are."""

    @abstractmethod
    def plan(self, tokens: Tokens) -> Plan:
        """Decide where each token goes, from what enters the block.  Traced: plain torch, no branch on data."""

    def note(self, place: Place) -> str:
        """What the report says of the method's choices in a block, where its parameters do not; "" for nothing."""
        return ""

    def shorten(self, x: Tensor, tokens: Tokens) -> Tensor | None:
        """[B, N', C] what enters in place of x [B, N, C]; None: what the plan makes of it."""
        return None

    def lengthen(self, y: Tensor, tokens: Tokens) -> Tensor | None:
        """[B, N, C] what leaves where y [B, N', C] comes out; None: for each token what its slot has."""
        return None

    def grid_of(self, place: Place) -> tuple[int, int] | None:
        """Rows and columns of a block's tokens; None where they are not known."""
        return None if place.image is None else place.grid(place.image)

    def selected(self, blocks: int) -> list[int]:
        """Blocks this pass wants, out of so many; raises BadParameter for one that does not exist."""
        return chosen_layers(range(blocks) if self.layers is None else self.layers, blocks, self.name)

    def why_not(self, graph: TokenGraph) -> str:
        """Why this method cannot run on the graph; "" when it can."""
        if not graph.sites:
            return "the model was rewritten before; tokens are merged around the sub-layers of an original alone"
        return ""

    def apply(self, graph: TokenGraph, options: Options) -> Result:
        """Rewrite with this method alone."""
        return self.apply_together([self], graph, options)

    @classmethod
    def apply_together(cls, passes: Sequence[Pass], graph: TokenGraph, options: Options) -> Result:
        """Rewrite with all methods in one re-execution; a sub-layer is reduced by the first that wants it."""
        from .around import reduce_around

        return reduce_around(graph, [one for one in passes if isinstance(one, SubLayerReduction)], options)
