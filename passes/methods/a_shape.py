"""A-shape and tri-shape: the first keys, the nearest keys, and for the last tokens all keys.

Source: the static patterns of Jiang et al., "MInference 1.0", NeurIPS 2024, arXiv 2407.02490, section 3 (A-shape is
StreamingLLM's mask used for a prompt: Xiao et al., ICLR 2024, arXiv 2309.17453); tri-shape as in Li et al., SCBench,
arXiv 2412.10319 (methods, llm 1.1).  Differs: the scale is that of the model's head size, which the published kernel
takes after padding the head.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...attention_index import AttentionIndex, Heads
from ...registry import register
from ..sparse import SparseAttention


@register("a-shape")
@dataclass(frozen=True)
class AShape(SparseAttention):
    """Every token reads the first `sink` tokens and the `local` tokens up to itself.

    What stands between cannot be found again: a pattern for fluent text and the control for methods that choose.

    Args:
        sink: first tokens, read by all.
        local: nearest tokens read, itself among them.
        layers: layers to use it in; all of them by default.
    """

    sink: int = 128
    local: int = 3968

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(sink=("0 or more", self.sink >= 0), local=("1 or more", self.local >= 1))

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """A window over everything."""
        return cls(local=tokens)

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        return f"reads the first {self.sink} and the {self.local} nearest tokens"

    def index(self, heads: Heads) -> AttentionIndex:
        """Nothing is looked up: both parts are the op's own."""
        return AttentionIndex(rows=64, sink=self.sink, local=self.local)


@register("tri-shape")
@dataclass(frozen=True)
class TriShape(AShape):
    """As a-shape, and the last `last` tokens of the prompt, which ask the question, read every token.

    Args:
        sink: first tokens, read by all.
        local: nearest tokens read, itself among them.
        last: last tokens, which read all.
        layers: layers to use it in; all of them by default.
    """

    last: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(last=("0 or more", self.last >= 0))

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        return f"{super().reads}; the last {self.last} read all"

    def index(self, heads: Heads) -> AttentionIndex:
        """A-shape with dense last rows."""
        return AttentionIndex(rows=64, sink=self.sink, local=self.local, last=self.last)
