"""ToMe: token merging by bipartite soft matching of keys.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461, section 3 and appendix D; the
kth and random matchings are those of its code (merge.py:100-207, methods card 1.10).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...counts import HALF, CountRule, Term
from ...errors import BadParameter
from ...kernels.hash_scores import hash_scores
from ...registry import register
from ...tokens import Plan, Tokens
from ..plans import join_plan, keep_plan, match_plan, ranks, real_count
from ..properties import MERGING
from ..reduction import KEEP_ONE, TokenReduction

MATCHINGS = ("parity", "kth", "random")


@register("tome")
@dataclass(frozen=True)
class ToMe(TokenReduction):
    """Merge the r most similar pairs of tokens between attention and MLP, in every layer.

    Tokens are split by parity of position; each even one is compared (cosine of the head-mean key) with all odd ones,
    and the r best edges merge as a size-weighted mean.  Keys are taken before rotary position embedding (the paper's
    models have none), so that content decides, not distance.  Protected: class and distillation tokens as published,
    register tokens as our extension.  Order of the result, part of the method: prefix, unmerged even tokens, odd
    tokens.

    The other matchings choose who merges without a look at the tokens, and merge every one of those into the most
    similar of the others; they are for comparison.  "kth" makes groups of k in order: the last of each is merged into,
    its others merge.  "random" draws the r that merge.  Ours differ from the code, which has them for models without a
    class token: the prefix is protected, what is left after whole groups of k is a group too (the code loses it, and
    if it stayed a shorter row could have more tokens left than a longer one), the order is the original one (the code
    leaves a random one), and the mean is by size.

    Args:
        r: tokens merged per layer; at most half of the unprotected tokens can merge at one layer.
        keep_ratio: fraction of unprotected tokens kept per layer, instead of r (ours; r = floor(T - T*keep_ratio)).
        layers: layers to merge in; all of them by default.
        matching: "parity", as above, "kth" or "random".
        k: size of the groups of kth; it replaces r and keep_ratio.
        seed: of random: another draw for each.
        prop_attn: proportional attention, log sizes added to the logits of later attention (off for MAE off the shelf).
    """

    limit: ClassVar[Term] = HALF
    properties: ClassVar[frozenset[str]] = MERGING

    matching: str = "parity"
    k: int | None = None
    seed: int = 0
    prop_attn: bool = True

    def __post_init__(self) -> None:
        if self.matching not in MATCHINGS:
            rule, hint = f"one of {', '.join(MATCHINGS)}", "parity is the published method."
            raise BadParameter(where=self.name, name="matching", rule=rule, got=self.matching, hint=hint)
        if (self.k is None) == self.counts_itself or (self.k is not None and (type(self.k) is not int or self.k < 2)):
            rule, hint = "2 or more with matching=kth, and left out otherwise", "kth makes one token of every k."
            raise BadParameter(where=self.name, name="k", rule=rule, got=self.k, hint=hint)
        super().__post_init__()

    @property
    def counts_itself(self) -> bool:
        """Groups of k say it."""
        return self.matching == "kth"

    @property
    def tracks_sizes(self) -> bool:
        """Log-size bias as `prop_attn` says."""
        return self.prop_attn

    def rule(self, layer: int, layers: int, prefix: int) -> CountRule:
        """Groups of k become one token each; of a random draw one token must be left to merge into."""
        if self.k is not None:
            return CountRule(prefix, ((self.k - 1, 0, self.k),))
        rule = super().rule(layer, layers, prefix)
        return rule if self.matching == "parity" else replace(rule, terms=(*rule.terms[:-1], KEEP_ONE))

    def plan(self, tokens: Tokens) -> Plan:
        """Match on the head-mean keys [B, N, D], in float32: half types cannot tell close cosines apart."""
        metric = tokens.keys_before_rope.mean(1, dtype=torch.float32)
        if self.matching == "parity":
            return match_plan(tokens, metric)
        rank = ranks(tokens) - tokens.prefix
        if self.k is None:
            kept = keep_plan(tokens, hash_scores(tokens.positions, self.seed, tokens.layer))
            return join_plan(tokens, kept, metric, rank >= 0)
        ends = (rank % self.k == self.k - 1) | (rank == real_count(tokens) - tokens.prefix - 1)
        last = (rank >= 0) & ends
        return join_plan(tokens, keep_plan(tokens, last.long()), metric, last)
