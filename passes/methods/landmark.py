"""Landmark attention: a token at the end of every block stands for the block.

Source: Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers", NeurIPS
2023, arXiv 2305.16300 (methods, llm 1.14).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention_index import Heads
from ...registry import register
from ..sparse import SparseAttention


@register("landmark")
@dataclass(frozen=True)
class Landmark(SparseAttention):
    """Every token reads its own block, and earlier blocks through their landmarks.

    A landmark's weight is shared out to the tokens of its block by a softmax among themselves.  For models trained so,
    on prompts that hold the landmark token after every `mem_freq` others, counted from the first real token: the pass
    puts in none, and knows them by place.  On any other model the last token of each block is taken for a landmark,
    and quality drops.  With no landmark in the prompt attention is dense.  Differs: positions are the prompt's, where
    published inference moves the blocks it reads next to each other; any number of blocks.

    Time and memory go with the square of the length, as in training: this is the model's own attention, not a faster
    one.

    Args:
        mem_freq: tokens between landmarks (published: 63; 50 in the fine-tuned LLaMA).
        top_k: earlier blocks that each token and head reads, those with the highest landmarks; all by default
            (published: all in training, 2 to 5 later).
        layers: layers to use it in; all of them by default.
    """

    indexed = False

    mem_freq: int = 63
    top_k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            mem_freq=("1 or more", self.mem_freq >= 1),
            top_k=("1 or more", self.top_k is None or self.top_k >= 1),
        )

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """No landmark comes up."""
        return cls(mem_freq=tokens)

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        many = "all" if self.top_k is None else f"{self.top_k}"
        return f"reads its block of {self.mem_freq} tokens, and {many} earlier blocks by their landmarks"

    def attend(self, heads: Heads) -> Tensor:
        """The op's definition."""
        return torch.ops.tamis.landmark_attention(
            heads.queries,
            heads.keys,
            heads.values,
            heads.lengths,
            self.mem_freq + 1,
            self.top_k or 0,
            heads.scale,
            heads.softcap,
        )
