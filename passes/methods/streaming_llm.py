"""StreamingLLM: the first keys and the nearest, for a whole prompt.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024, arXiv 2309.17453, section 3
(methods, llm 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...attention_index import Heads
from ...graph import Site
from ...registry import register
from .a_shape import AShape
from .lm_infinite import TwoAngles

POSITIONS = ("prompt", "slot")


@register("streaming-llm")
@dataclass(frozen=True)
class StreamingLLM(TwoAngles):
    """The mask under which StreamingLLM generates, over a whole prompt: four sinks and a window.

    The published method evicts the rest from the cache while it generates; over a prompt of its own it is dense.  With
    positions=slot the result is that of reading the prompt token by token with such a cache: tokens stand where their
    keys lie in the cache, so the sinks are never farther away than it is long.  Distances within the window are the
    same either way.

    Args:
        sink: first tokens, read by all.
        local: nearest tokens read, itself among them.
        positions: "prompt" as in the prompt, or "slot" as in a cache of sink + local tokens.
        layers: layers to use it in; all of them by default.
    """

    at_origin: ClassVar[bool] = False

    sink: int = 4
    local: int = 2044
    positions: str = "prompt"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(positions=(f"one of {', '.join(POSITIONS)}", self.positions in POSITIONS))

    @property
    def reach(self) -> int:
        """The last slot of the cache: the newest token's."""
        return self.sink + self.local - 1

    def attend(self, heads: Heads) -> Tensor:
        """With slot positions, two parts in one softmax."""
        return super().attend(heads) if self.positions == "slot" else AShape.attend(self, heads)

    def why_not_at(self, site: Site) -> str:
        """Positions of the prompt need no rotary embedding."""
        return super().why_not_at(site) if self.positions == "slot" else AShape().why_not_at(site)
