"""Routing Transformer: heads attend within clusters of alike queries and keys.

Source: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", TACL 2021, arXiv 2003.05997,
section 4.1 (methods, llm 1.11).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...attention_index import Heads
from ...registry import register
from ...weight_errors import WeightsMismatch
from ...weights import Shape, TrainedPass
from ..sparse import SparseAttention
from ..sparse_scores import best, is_real, ranks, repeated
from ..stream_state import take_rows


@register("routing")
@dataclass(frozen=True)
class Routing(TrainedPass, SparseAttention):
    """Tokens attend within clusters of queries and keys that point the same way.

    Every cluster takes the `window` queries and the `window` keys whose direction is closest to its centroid.  Its
    queries attend to its keys, where causal to those that do not stand later in the prompt.  A token in several
    clusters gets their mean, one in none gets 0.  Published models route half of the heads and keep the others local:
    `a-shape:sink=0,local=256 + routing:heads=[4,5,6,7]`, of eight.

    **Which tokens a cluster takes depends on all of the prompt**, later tokens too: attention itself looks back only,
    the choice does not.  So generating token by token is not what this computes.

    Centroids are trained with the model.  Without `weights` they are fitted to the keys of every prompt, by rounds of
    spherical k-means from evenly spread keys; how well that does is not known.  Differs: no learned memory keys, which
    published causal clusters have, so a cluster in which a query sees nothing is not in its mean; centroids are not
    moved.

    Args:
        clusters: centroids per head, where there are no `weights`.
        window: queries, and keys, of a cluster; by default the prompt's tokens shared out evenly, rounded up.
        rounds: of k-means, where there are no `weights`.
        weights: for every chosen layer `layers.{layer}.centroids` [H, clusters, D], H being the query heads that are
            routed there, in order.
        layers: layers to use it in; all of them by default.
        heads: query heads to route; all by default.
    """

    bidirectional = True
    indexed = False
    looks_ahead = True
    untrained = True

    clusters: int = 16
    window: int | None = None
    rounds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            clusters=("1 or more", self.clusters >= 1),
            window=("1 or more", self.window is None or self.window >= 1),
            rounds=("0 or more", self.rounds >= 0),
        )

    @classmethod
    def full(cls, tokens: int) -> SparseAttention:
        """One cluster of all."""
        return cls(clusters=1)

    @property
    def reads(self) -> str:
        """What a query reads, for the report."""
        many = "an even share of the tokens" if self.window is None else f"{self.window} tokens"
        return f"reads the keys of the clusters that take it; each takes {many}"

    def expected(self, layers: Sequence[int], width: int) -> Mapping[str, Shape]:
        """Centroids per chosen layer."""
        return {f"layers.{layer}.centroids": (None, None, width) for layer in layers}

    def attend(self, heads: Heads) -> Tensor:
        """Attention within clusters."""
        queries, keys = (normalize(x.float(), dim=-1) for x in (heads.queries, repeated(heads.keys, heads)))
        centroids = self.centroids(heads, keys)
        lists = [self.members(x, centroids, heads) for x in (queries, keys)]
        return torch.ops.tamis.clustered_attention(
            heads.queries, heads.keys, heads.values, *lists, heads.scale, heads.causal, heads.softcap
        )

    def centroids(self, heads: Heads, keys: Tensor) -> Tensor:
        """[B or 1, H, c, D]: trained, or fitted to unit keys [B, H, N, D]."""
        if not self.weights:
            return _fitted(keys, heads, self.clusters, self.rounds)
        name = f"layers.{heads.layer}.centroids"
        found, (_, many, _, size) = heads.weights[name], keys.shape
        if found.shape[0] != many:
            reason = f"{name} is for {found.shape[0]} heads, and {many} are routed"
            expected = f"{name} [{many}, any, {size}]"
            fields = {"reason": reason, "expected": expected, "width": size, "layers": [heads.layer]}
            raise WeightsMismatch(where=self.name, path=str(self.weights), **fields)
        return found.unsqueeze(0)

    def members(self, x: Tensor, centroids: Tensor, heads: Heads) -> Tensor:
        """Places of each cluster's members among unit vectors x [B, H, N, D]: [B, H, c, w] ascending, -1: none.

        Ties: lowest place.
        """
        clusters, tokens = centroids.shape[2], heads.tokens
        scores = centroids @ x.transpose(2, 3)
        real = is_real(heads)[:, None, None, :]
        ends = tokens if heads.lengths is None else heads.lengths.reshape(-1, 1, 1, 1)
        share, room = ((n + clusters - 1) // clusters if self.window is None else self.window for n in (ends, tokens))
        chosen = (ranks(torch.where(real, scores, -torch.inf)) < share) & real
        return best(scores, room, chosen, torch.zeros_like(chosen))


def _fitted(keys: Tensor, heads: Heads, clusters: int, rounds: int) -> Tensor:
    """Spherical k-means of the unit keys [B, H, N, D] that are no padding: [B, H, c, D].

    Starts from keys spread evenly over the prompt; a key goes to the closest centroid (ties: the first), and a centroid
    without keys stays.
    """
    batch, device = keys.shape[0], keys.device
    number = torch.arange(clusters, device=device)
    ends = torch.arange(batch, device=device) * 0 + heads.tokens if heads.lengths is None else heads.lengths
    centroids = take_rows(keys, (2 * number + 1) * ends.unsqueeze(1) // (2 * clusters), 2, 0)
    real = is_real(heads)[:, None, :, None]
    for _ in range(rounds):
        nearest = (keys @ centroids.transpose(2, 3)).sort(dim=-1, descending=True, stable=True).indices[..., :1]
        sums = ((nearest == number) & real).float().transpose(2, 3) @ keys
        centroids = torch.where((sums != 0).any(-1, keepdim=True), normalize(sums, dim=-1), centroids)
    return centroids
