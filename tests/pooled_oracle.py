"""How much of each token every query reads, by the definitions of the methods that pool, group or dilate: plain loops.

Each function gives weights [B, H, N, N] in float64, by which the values are mixed; rows of padding are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tamis.attention_index import Heads
from tamis.passes.methods.combiner import CCA, Combiner
from tamis.passes.methods.dilated import Dilated
from tamis.passes.methods.landmark import Landmark
from tamis.passes.methods.routing import Routing

Summary = tuple[Tensor, Tensor, float]


class Head:
    """One head of one row of the batch: its real tokens, float64."""

    def __init__(self, heads: Heads, row: int, head: int) -> None:
        end = heads.queries.shape[2] if heads.lengths is None else int(heads.lengths[row])
        self.q = heads.queries[row, head, :end].double()
        self.k = heads.keys[row, head // heads.group, :end].double()
        self.scale, self.softcap, self.causal, self.end, self.head = heads.scale, heads.softcap, heads.causal, end, head

    def logits(self, query: Tensor, keys: Tensor) -> Tensor:
        found = keys @ query * self.scale
        return found if self.softcap is None else torch.tanh(found / self.softcap) * self.softcap

    def spans(self, size: int) -> list[range]:
        return [range(at, min(at + size, self.end)) for at in range(0, self.end, size)]


def weights_of(heads: Heads, row_of: Callable[[Head], Tensor]) -> Tensor:
    """One head after the other: row_of gives [end, end]."""
    batch, many, tokens = heads.queries.shape[:3]
    found = torch.zeros(batch, many, tokens, tokens, dtype=torch.float64)
    for b in range(batch):
        for h in range(many):
            one = Head(heads, b, h)
            found[b, h, : one.end, : one.end] = row_of(one)
    return found


def mixed(heads: Heads, weights: Tensor) -> Tensor:
    return weights @ heads.values.double().repeat_interleave(heads.group, 1)


def _one_softmax(one: Head, near: Callable[[int], Iterator[int]], summaries: list[Summary]) -> Tensor:
    """near: tokens a query reads; summaries: key, weights of tokens [end], added to the logit.

    A summary is read where no token it stands for is near, and none is later in causal attention.
    """
    found = torch.zeros(one.end, one.end, dtype=torch.float64)
    for i in range(one.end):
        tokens = list(near(i))
        far = [
            (key, parts, bias)
            for key, parts, bias in summaries
            if not set(parts.nonzero().flatten().tolist()) & set(tokens)
            and not (one.causal and int(parts.nonzero().max()) > i)
        ]
        logits = [one.logits(one.q[i], one.k[tokens])]
        logits += [one.logits(one.q[i], key[None]) + bias for key, _, bias in far]
        share = torch.cat(logits).softmax(0)
        found[i, tokens] = share[: len(tokens)]
        for part, (_, parts, _) in zip(share[len(tokens) :], far, strict=True):
            found[i] += part * parts
    return found


def combiner(heads: Heads, method: Combiner) -> Tensor:
    def row_of(one: Head) -> Tensor:
        summaries = []
        for span in one.spans(method.span):
            q, k = one.q[list(span)], one.k[list(span)]
            query, key = (x.amax(0) if method.pool == "max" else x.mean(0) for x in (q, k))
            parts = torch.zeros(one.end, dtype=torch.float64)
            parts[list(span)] = one.logits(query, k).softmax(0)
            bias = float(torch.tensor(float(len(span))).double().log()) if method.log_size else 0.0
            summaries.append((key, parts, bias))

        def near(i: int) -> Iterator[int]:
            start = i // method.span * method.span
            yield from range(start, i + 1 if one.causal else min(start + method.span, one.end))

        return _one_softmax(one, near, summaries)

    return weights_of(heads, row_of)


def cca(heads: Heads, method: CCA, turn: Callable[[Tensor, int], Tensor] = lambda key, _: key) -> Tensor:
    """Counted from 1, as on the page: groups 1 .. j, j = max(0, floor((i - s) / g)), and tokens j * g + 1 .. i.

    turn  a key moved on by so many positions
    """

    def row_of(one: Head) -> Tensor:
        summaries = []
        for span in one.spans(method.span):
            k = one.k[list(span)]
            parts = torch.zeros(one.end, dtype=torch.float64)
            parts[list(span)] = one.logits(one.q[span[-1]], k).softmax(0)
            moved = torch.stack([turn(key, len(span) - 1 - i) for i, key in enumerate(k)])
            summaries.append((parts[list(span)] @ moved, parts, 0.0))

        def near(i: int) -> Iterator[int]:
            groups = max(0, (i + 1 - method.local) // method.span)
            yield from range(groups * method.span, i + 1)

        return _one_softmax(one, near, summaries)

    return weights_of(heads, row_of)


def rotated(key: Tensor, by: int) -> Tensor:
    """A Llama's key [D], moved on by so many positions: channel c and c + D / 2 turn by 10000 ** (-2c / D) for each."""
    half = len(key) // 2
    angle = by * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    x, y = key[:half], key[half:]
    return torch.cat([x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin()])


def dilated(heads: Heads, method: Dilated) -> Tensor:
    behind = [far for far in range(10000) if far >= method.near and far % method.step == 0][: method.local]

    def row_of(one: Head) -> Tensor:
        found = torch.zeros(one.end, one.end, dtype=torch.float64)
        for i in range(one.end):
            tokens = [
                j
                for j in range(i + 1 if one.causal else one.end)
                if (j < method.sink or i < method.first or abs(i - j) < method.near or abs(i - j) in behind)
                and abs(i - j) < (heads.window or one.end)
            ]
            found[i, tokens] = one.logits(one.q[i], one.k[tokens]).softmax(0)
        return found

    return weights_of(heads, row_of)


def landmark(heads: Heads, method: Landmark) -> Tensor:
    size = method.mem_freq + 1

    def row_of(one: Head) -> Tensor:
        found = torch.zeros(one.end, one.end, dtype=torch.float64)
        for i in range(one.end):
            own = [j for j in range(i // size * size, i + 1) if j % size != size - 1]
            logits = one.logits(one.q[i], one.k)
            blocks = sorted(range(i // size), key=lambda m: (-float(logits[m * size + size - 1]), m))
            blocks = blocks if method.top_k is None else blocks[: method.top_k]
            marks = [m * size + size - 1 for m in blocks]
            shares = logits[own + marks].softmax(0)
            found[i, own] = shares[: len(own)]
            for block, share in zip(blocks, shares[len(own) :], strict=True):
                tokens = list(range(block * size, block * size + size - 1))
                found[i, tokens] = share * logits[tokens].softmax(0)
        return found

    return weights_of(heads, row_of)


def routing(heads: Heads, method: Routing) -> Tensor:
    """Clusters of the trained centroids of `heads`, or of k-means round by round; in float32, as all selections."""

    def row_of(one: Head) -> Tensor:
        q, k = (x.float() / x.float().norm(dim=1, keepdim=True) for x in (one.q, one.k))
        if method.weights:
            centroids = heads.weights[f"layers.{heads.layer}.centroids"][one.head]
        else:
            centroids = _k_means(k, method.clusters, method.rounds)
        share = method.window or -(-one.end // len(centroids))
        found, clusters = torch.zeros(one.end, one.end, dtype=torch.float64), [0] * one.end
        for centroid in centroids:
            queries, keys = (_closest(x, centroid, share) for x in (q, k))
            for i in queries:
                seen = [j for j in keys if j <= i or not one.causal]
                if seen:
                    found[i, seen] += one.logits(one.q[i], one.k[seen]).softmax(0)
                    clusters[i] += 1
        return found / torch.tensor(clusters).clamp(min=1)[:, None]

    return weights_of(heads, row_of)


def _closest(x: Tensor, centroid: Tensor, many: int) -> list[int]:
    near = (x @ centroid).tolist()
    return sorted(sorted(range(len(x)), key=lambda i: (-near[i], i))[:many])


def _k_means(x: Tensor, many: int, rounds: int) -> Tensor:
    centroids = torch.stack([x[(2 * c + 1) * len(x) // (2 * many)] for c in range(many)])
    for _ in range(rounds):
        taken = [max(range(many), key=lambda c, i=i: (float(x[i] @ centroids[c]), -c)) for i in range(len(x))]
        for c in range(many):
            own = [x[i] for i, of in enumerate(taken) if of == c]
            if own:
                mean = torch.stack(own).sum(0)
                centroids[c] = mean / mean.norm()
    return centroids


@torch.no_grad()
def model_by_hand(model: Any, inputs: Any, layer: int, causal: bool, attention: Callable[[Heads], Tensor]) -> Any:
    """A transformers model on rows without padding whose layer `layer` attends as told, others as ever; in float32."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = []

    def answer(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> tuple[Tensor, None]:
        seen.append(module)
        if len(seen) - 1 != layer:
            rest = {**rest, "is_causal": causal}
            return sdpa_attention_forward(module, query, key, value, None, **rest)
        heads = Heads(query, key, value, None, rest["scaling"], causal, None, layer, 2)
        return attention(heads).to(query.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_hand", answer)
    model.set_attn_implementation("by_hand")
    try:
        return model(**inputs)[0]
    finally:
        model.set_attn_implementation("sdpa")
