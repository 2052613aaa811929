"""landmark_attention: tokens of earlier blocks share the weight that their block's landmark gets.

Blocks are `block` tokens, the last of which is the block's landmark.  Query i of block c has one softmax A over

    logits of its own block's tokens up to itself, without the landmark (a landmark does not read itself), and
    logits of the landmarks of earlier blocks, of all or of the `keep` with the highest logits (ties: first block),

and within each earlier block m a softmax B over its tokens without the landmark:

    out[b, h, i] = sum of A[i, j] v_j over j in c  +  sum of A[i, landmark of m] B[i, j] v_j over m < c, j in m

with logits cap(scale * q_i . k_j).  A landmark's own value is read by nobody.

q        [B, H, N, D]     float
k, v     [B, Hk, N, D]    float    Hk divides H; head h reads key head h // (H / Hk)
lengths  [B]              int64    real tokens, which come first in each row; None: N
block    int              2 or more
keep     int              earlier blocks read, by every query and head; 0: all
scale    float
softcap  float            cap(x) = softcap * tanh(x / softcap); None: cap(x) = x
->       [B, H, N, D] as q; 0 for padding

Time and memory go with N * N, whatever `keep` is: every block has a softmax for every query.  Raises nothing of its
own.
Source: Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers", NeurIPS
2023, arXiv 2305.16300, section 3 (methods, llm 1.14).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import script
from torch import Tensor
from torch.nn.functional import pad

from ..op import OnnxCall, Op, define_op
from .attention import capped, grouped_logits, grouped_mix, softmax_of_seen
from .onnx_logits import GroupedLogits
from .opset import STANDARD as op
from .opset import TAMIS

MaybeTensor = Tensor | None


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: MaybeTensor,
    block: int,
    keep: int,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """See the module."""
    batch, heads, tokens = q.shape[:3]
    logits = capped(grouped_logits(q, k, scale), softcap)
    count = (tokens + block - 1) // block
    logits = pad(logits, (0, count * block - tokens), value=-torch.inf).reshape(batch, heads, tokens, count, block)
    place = torch.arange(tokens, device=q.device)
    query, tile = place[:, None, None], torch.arange(count, device=q.device)[:, None]
    key = tile * block + torch.arange(block - 1, device=q.device)
    own = (key <= query) & (tile == query // block)  # [N, count, block - 1]
    earlier = (tile < query // block)[..., 0]  # [N, count]
    inside, marks = logits[..., : block - 1], torch.where(earlier, logits[..., block - 1], -torch.inf)
    if keep:
        ranks = marks.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        marks = torch.where(ranks < keep, marks, -torch.inf)
    near = torch.where(own, inside, -torch.inf).flatten(3)
    shared = softmax_of_seen(torch.cat([near, marks], -1))
    many = near.shape[-1]
    weights = shared[..., many:].unsqueeze(-1) * softmax_of_seen(inside) + shared[..., :many].reshape(inside.shape)
    weights = pad(weights, (0, 1)).flatten(3)[..., :tokens]
    out = grouped_mix(weights, v, q)
    if lengths is None:
        return out
    return torch.where(place[:, None] < lengths.reshape(-1, 1, 1, 1), out, 0.0)


def fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """Shape rule."""
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@script(TAMIS, default_opset=op)
def SoftmaxOfSome(logits):
    none = op.Constant(value_float=float("-inf"))
    weights = op.Softmax(op.Max(logits, op.Constant(value_float=-3.4028234663852886e38)), axis=-1)
    return op.Where(logits > none, weights, op.Constant(value_float=0.0))


@script(TAMIS, default_opset=op)
def LandmarkAttention(q, k, v, lengths, block: int, keep: int, scale: float, softcap: float):
    none = op.Constant(value_float=float("-inf"))
    tokens, size = op.Shape(q, start=2, end=3), op.Expand(block, [1])
    logits = GroupedLogits(q, k, scale)
    capped = op.Expand(softcap, [1]) > 0
    bound = op.Where(capped, op.Expand(softcap, [1]), op.Constant(value_floats=[1.0]))
    logits = op.Where(capped, op.Tanh(logits / bound) * bound, logits)
    count = (tokens + size - 1) / size
    logits = op.Pad(logits, op.Concat([0, 0, 0, 0, 0, 0, 0], count * size - tokens, axis=0), none)
    rows = op.Shape(q, start=0, end=3)
    blocks = op.Concat(rows, count, size, axis=0)
    logits = op.Reshape(logits, blocks, allowzero=1)
    query = op.Unsqueeze(op.Range(0, op.Squeeze(tokens), 1), [1])
    tile = op.Range(0, op.Squeeze(count), 1)
    mark = op.Slice(logits, size - 1, size, [-1])
    earlier = op.Where(tile < query / block, op.Squeeze(mark, [-1]), none)
    # the keep-th best and those before it; ties to the lower index, as TopK has it
    most = op.Where(op.Expand(keep, [1]) > 0, op.Min(op.Expand(keep, [1]), count), count)
    best, at = op.TopK(earlier, most, axis=-1)
    marks = op.ScatterElements(op.Expand(none, op.Shape(earlier)), at, best, axis=-1)
    inside = op.Slice(logits, [0], size - 1, [-1])
    key = op.Unsqueeze(tile, [1]) * block + op.Range(0, op.Squeeze(size) - 1, 1)
    each = op.Unsqueeze(query, [2])
    own = op.And(key <= each, op.Unsqueeze(tile, [1]) == each / block)
    near = op.Reshape(op.Where(own, inside, none), op.Concat(rows, count * (size - 1), axis=0), allowzero=1)
    shared = SoftmaxOfSome(op.Concat(near, marks, axis=-1))
    many = op.Shape(near, start=3, end=4)
    of_marks = op.Unsqueeze(op.Slice(shared, many, many + count, [-1]), [-1])
    of_own = op.Reshape(op.Slice(shared, [0], many, [-1]), op.Shape(inside), allowzero=1)
    weights = of_marks * SoftmaxOfSome(inside) + of_own
    weights = op.Concat(weights, op.Expand(op.Constant(value_float=0.0), op.Shape(mark)), axis=-1)
    weights = op.Reshape(weights, op.Concat(rows, count * size, axis=0), allowzero=1)
    weights = op.Slice(weights, [0], tokens, [-1])
    heads, key_heads = op.Shape(q, start=1, end=2), op.Shape(v, start=1, end=2)
    together = op.Concat(op.Shape(q, start=0, end=1), key_heads, heads / key_heads * tokens, tokens, axis=0)
    mixed = op.MatMul(op.Reshape(weights, together, allowzero=1), op.Cast(v, to=1))
    mixed = op.Reshape(mixed, op.Concat(rows, op.Shape(v, start=3, end=4), axis=0), allowzero=1)
    real = query < op.Reshape(op.Where(lengths < 0, tokens, lengths), [-1, 1, 1, 1])
    return op.CastLike(op.Where(real, mixed, op.Constant(value_float=0.0)), q)


def onnx(q: Tensor, k: Tensor, v: Tensor, lengths: MaybeTensor, *numbers: Any) -> OnnxCall:
    """Calls LandmarkAttention."""
    attributes = dict(zip(("block", "keep", "scale", "softcap"), (*numbers, None), strict=False))
    ends = [-1] if lengths is None else lengths
    return OnnxCall(LandmarkAttention, [q, k, v, ends], {**attributes, "softcap": attributes["softcap"] or 0.0})


def flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Both products over all pairs; causality halves nothing."""
    batch, heads, tokens, size = q
    return 2 * batch * heads * tokens * tokens * (size + v[3])


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 13, 8, generator=generator)
    k, v = (torch.randn(2, 2, 13, 8, generator=generator) for _ in range(2))
    lengths = torch.tensor([13, 6])
    yield q, k, v, None, 4, 0, 0.3
    yield q, k, v, lengths, 3, 2, 0.3
    yield q, k, v, lengths, 2, 1, 0.3, 1.5
    yield q.half(), k.half(), v.half(), None, 5, 0, 0.3
    yield q[:1], k[:1], v[:1], None, 40, 3, 0.3


LANDMARK_ATTENTION = define_op(
    Op(
        name="landmark_attention",
        schema="(Tensor q, Tensor k, Tensor v, Tensor? lengths, int block, int keep, float scale, "
        "float? softcap=None) -> Tensor",
        reference=reference,
        fake=fake,
        onnx=onnx,
        flops=flops,
        samples=samples,
    )
)
