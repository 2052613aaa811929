"""match_destinations: the tokens most similar to one of the given destinations merge into it.

metric        [B, N, D] float  what similarity is measured on
destinations  [M]       int64  tokens that others may merge into, ascending, all different, each >= P; M >= 1
out           count            N': tokens after, at least P + M; N - N' merge
prefix        int              protected leading tokens P
->            slot   [B, N]       int64: output slot of each token
              leader [B, N']      int64: the token that stands for each slot
              moved  [B, N - N']  int64: tokens merged into a slot led by another, ascending

Sources are all tokens but the protected and the destinations, in ascending order.  Per row:
1. S_ij = cosine of source i and destination j;  mu_i = max_j S_ij,  j*_i = argmax_j S_ij
2. the N - N' sources with the highest mu merge into j*
3. slots: [the P protected | sources that stay, by falling mu | destinations, ascending]

Float32 arithmetic (float64 for float64 input).  Ties: lowest index, in argmax and in the order by mu (stable).  A token
whose metric has a zero, infinite or NaN norm counts as the zero vector.  No padding.  Raises nothing of its own.
Source: methods card 2.2, steps 2 and 3 (Bolya and Hoffman 2023, merge.py:20-97).  Differs: stable order, guarded norm,
both lists ascending where the code leaves their order open, protected tokens, destinations given by the caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor

from ..op import OnnxCall, Op, define_op
from .bipartite_match import unit_vectors
from .opset import STANDARD as op
from .opset import TAMIS
from .rows import first_columns, take_rows
from .symbols import spare_length


def reference(metric: Tensor, destinations: Tensor, out: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """See the module."""
    unit = unit_vectors(metric)
    batch, tokens = unit.shape[:2]
    removed, count = tokens - out, tokens - destinations.shape[0] - prefix
    position = torch.arange(tokens, device=unit.device)
    taken = torch.zeros_like(position).scatter(0, destinations, 1)
    sources = taken.sort(stable=True).indices[prefix : prefix + count]
    similarity = torch.bmm(unit[:, sources], unit[:, destinations].transpose(1, 2))
    order = similarity.amax(2).sort(dim=1, descending=True, stable=True).indices
    merging = order[:, :removed].sort(dim=1).values
    moved = sources[merging]
    protected, others = position[:prefix].expand(batch, -1), destinations.expand(batch, -1)
    # `out` long, which symbols do not know yet
    leader = first_columns(torch.cat([protected, sources[order[:, removed:]], others], 1), out)
    goal = take_rows(similarity, merging).argmax(2) + (prefix + count - removed)
    slots = torch.cat([position[:out].expand(batch, -1), goal], 1)
    return leader.new_empty((batch, tokens)).scatter(1, torch.cat([leader, moved], 1), slots), leader, moved


def fake(metric: Tensor, destinations: Tensor, out: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shape rule."""
    batch, tokens = metric.shape[:2]
    shapes = [(batch, tokens), (batch, out), (batch, spare_length(tokens, out))]
    slot, leader, moved = (metric.new_empty(shape, dtype=torch.int64) for shape in shapes)
    return slot, leader, moved


@script(TAMIS, default_opset=op)
def MatchDestinations(metric, destinations, out, prefix: int):
    x = op.Cast(metric, to=1)
    scaled = x / op.Max(op.ReduceL2(x, [-1], keepdims=1), 1e-12)
    unit = op.Where(op.IsNaN(scaled), 0.0, scaled)
    tokens = op.Shape(x, start=1, end=2)
    rows = op.Shape(x, start=0, end=1)
    size = op.Reshape(out, [1])
    removed = tokens - size
    count = tokens - op.Shape(destinations) - prefix
    position = op.Range(0, op.Squeeze(tokens), 1)
    free = op.ScatterElements(op.Expand(1, tokens), destinations, op.Expand(0, op.Shape(destinations)), axis=0)
    _, others = op.TopK(free, tokens, axis=0)
    sources = op.Slice(others, op.Reshape(prefix, [1]), count + prefix, [0])
    offered = op.Gather(unit, destinations, axis=1)
    similarity = op.MatMul(op.Gather(unit, sources, axis=1), op.Transpose(offered, perm=[0, 2, 1]))
    _, order = op.TopK(op.ReduceMax(similarity, [2], keepdims=0), count, axis=1)
    merging, _ = op.TopK(op.Slice(order, [0], removed, [1]), removed, axis=1, largest=0)
    moved = op.Gather(sources, merging, axis=0)
    stay = op.Gather(sources, op.Slice(order, removed, count, [1]), axis=0)
    nearest = op.ArgMax(op.GatherND(similarity, op.Unsqueeze(merging, [2]), batch_dims=1), axis=2, keepdims=0)
    goal = nearest + (count + prefix - removed)
    every = op.Expand(position, op.Concat(rows, tokens, axis=0))
    protected = op.Slice(every, [0], op.Reshape(prefix, [1]), [1])
    others_led = op.Expand(destinations, op.Concat(rows, op.Shape(destinations), axis=0))
    leader = op.Concat(protected, stay, others_led, axis=1)
    slots = op.Concat(op.Slice(every, [0], size, [1]), goal, axis=1)
    return op.ScatterElements(every, op.Concat(leader, moved, axis=1), slots, axis=1), leader, moved


def onnx(metric: Tensor, destinations: Tensor, out: int, prefix: int) -> OnnxCall:
    """Calls MatchDestinations."""
    return OnnxCall(MatchDestinations, [metric, destinations, out], {"prefix": prefix})


def flops(metric: Any, destinations: Any, out: int, prefix: int, **_: Any) -> int:
    """The similarity product: 2 * B * (N - P - M) * M * D."""
    batch, tokens, width = metric
    return 2 * batch * (tokens - prefix - destinations[0]) * destinations[0] * width


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    for batch, tokens, prefix, places, removed in [
        (2, 12, 0, (0, 3, 7, 10), 5),
        (2, 17, 1, (1, 4, 16), 13),
        (3, 9, 2, (2, 5), 1),
        (2, 7, 1, (3, 5, 6), 0),
        (0, 8, 0, (0, 4, 5), 2),
        (2, 71, 0, tuple(range(0, 71, 4)), 30),
    ]:
        metric = torch.randn(batch, tokens, 16, generator=generator)
        yield metric, torch.tensor(places), tokens - removed, prefix
    tied = torch.eye(4)[torch.randint(0, 4, (3, 37), generator=generator)]
    yield tied, torch.arange(1, 37, 5), 20, 1
    lost = torch.randn(2, 37, 5, generator=generator)
    lost[:, 3], lost[:, 8], lost[0, 14, 2], lost[1, 21, 0] = 0.0, torch.inf, torch.nan, -torch.inf
    yield lost, torch.arange(0, 37, 4), 19, 0
    yield torch.randn(2, 41, 16, generator=generator).half(), torch.arange(1, 41, 3), 30, 1


MATCH_DESTINATIONS = define_op(
    Op(
        name="match_destinations",
        schema="(Tensor metric, Tensor destinations, SymInt out, int prefix)"
        " -> (Tensor slot, Tensor leader, Tensor moved)",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
        triton=None,
    )
)
