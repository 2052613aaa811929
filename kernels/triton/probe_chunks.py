"""The kernel of `probe_chunks`: one launch; a program halves some chunks of one row of queries until a key is left.

Chunks are the rows of its products and queries asked the columns, since those are few.  A step gathers the two middle
keys of each chunk and multiplies both with the same queries, a key head after the other where several share a choice;
nothing is kept of a step but which half goes on.  A program whose chunks all lie behind the row's end asks nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..probe_chunks import LOWEST, halvings
from . import attention_tiles
from .architecture import Architecture
from .attention_tiles import keys_of, padded, strides, with_unit_columns
from .launch import Launch, Twin, Work
from .listed_keys import loaded, wanted

HIDDEN = tl.constexpr(LOWEST)
COUNTS = ["tokens", "many", "parts", "starts_batch", "starts_set", "starts_row", "starts_item"]


@triton.jit
def liked(best, queries, keys, query, there, key, WINDOW: tl.constexpr):
    """The largest product so far of each key [CHUNKS], and those with queries [QUERIES] that are there and see it."""
    products = tl.dot(keys, tl.trans(queries), input_precision="ieee")
    apart = query[None, :] - key[:, None]
    seen = there[None, :] & (apart >= 0)
    if WINDOW > 0:
        seen = seen & (apart < WINDOW)
    return tl.maximum(best, tl.max(tl.where(seen, products, HIDDEN), 1))


@triton.jit(do_not_specialize=COUNTS)
def probe_chunks_kernel(
    q, k, starts, lengths, scores, tokens, many, parts,
    q_batch, q_head, q_row, k_batch, k_head, k_row, starts_batch, starts_set, starts_row, starts_item,
    WIDTH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STRIDE: tl.constexpr,
    LOCAL: tl.constexpr, WINDOW: tl.constexpr, STEPS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    OWN: tl.constexpr, QUERIES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """scores[b, s, r, :]; grid (R * parts, S, B).

    HEADS: key heads whose queries decide together; GROUP: query heads of each that do; OWN: that each ask for itself.
    """
    row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    one, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    real = tokens
    if lengths is not None:
        real = tl.minimum(tl.load(lengths + batch), tokens).to(tl.int32)
    begin = row * BLOCK
    end = tl.where(begin < real, tl.minimum(begin + BLOCK, real) - LOCAL, 0)
    item = part * CHUNKS + tl.arange(0, CHUNKS)
    line = starts + batch * starts_batch + one.to(tl.int64) * starts_set + row.to(tl.int64) * starts_row
    start = tl.load(line + item.to(tl.int64) * starts_item, mask=item < many, other=-1).to(tl.int32)
    here = (start >= 0) & (start < end)
    left, right = tl.where(here, start, 0), tl.where(here, tl.minimum(start + CHUNK, end), 0)
    score = tl.full([CHUNKS], HIDDEN, tl.float32)
    column = tl.arange(0, D)
    LINE: tl.constexpr = (BLOCK + STRIDE - 1) // STRIDE
    for _ in range(tl.where(tl.max(here.to(tl.int32), 0) > 0, STEPS, 0)):
        middle = (left + right) // 2
        first, second = (left + middle) // 2, (middle + right) // 2
        nearer = tl.full([CHUNKS], HIDDEN, tl.float32)
        farther = nearer
        for shared in range(one // OWN * HEADS, one // OWN * HEADS + HEADS):
            of_head = k + batch * k_batch + tl.cast(shared, tl.int64) * k_head
            a = loaded(of_head + first.to(tl.int64)[:, None] * k_row + column[None, :], here, column, WIDTH, D)
            b = loaded(of_head + second.to(tl.int64)[:, None] * k_row + column[None, :], here, column, WIDTH, D)
            for asked in range(0, GROUP * LINE, QUERIES):
                member = asked + tl.arange(0, QUERIES)
                query = begin + member % LINE * STRIDE
                there = (member < GROUP * LINE) & (query < real)
                head = (shared * (OWN * GROUP) + one % OWN + member // LINE).to(tl.int64)
                queries = wanted(q + batch * q_batch, head, query, there, q_head, q_row, WIDTH, D)
                nearer = liked(nearer, queries, a, query, there, first, WINDOW)
                farther = liked(farther, queries, b, query, there, second, WINDOW)
        score = tl.maximum(score, tl.maximum(nearer, farther))
        left, right = tl.where(nearer >= farther, left, middle), tl.where(nearer >= farther, middle, right)
    own = (batch * tl.num_programs(1) + one) * (tl.num_programs(0) // parts) + row
    tl.store(scores + own * many + item, tl.where(here, score, HIDDEN), mask=item < many)


def work(
    architecture: Architecture,
    q: Tensor,
    k: Tensor,
    starts: Tensor,
    lengths: Tensor | None,
    chunk: int,
    stride: int,
    block: int,
    local: int,
    share: str,
    window: int = 0,
) -> Work:
    """One launch."""
    (batch, heads, tokens, size), key_heads, many = q.shape, k.shape[1], starts.shape[3]
    rows, group = triton.cdiv(tokens, block), heads // key_heads
    sets = {"layer": 1, "kv": key_heads, "query": heads}[share]
    q, k, lengths = (with_unit_columns(x) for x in (q, k, lengths))
    scores = q.new_empty((batch, sets, rows, many), dtype=torch.float32)
    config = architecture.config("probe_chunks_kernel", *keys_of(size, q))
    asked = (1 if share == "query" else group) * triton.cdiv(block, stride)
    parts = triton.cdiv(many, config.constants["CHUNKS"])
    arguments: dict[str, Any] = {
        **{"q": q, "k": k, "starts": starts, "lengths": lengths, "scores": scores},
        **{"tokens": tokens, "many": many, "parts": parts},
        **strides("q", q, "batch", "head", "row"),
        **strides("k", k, "batch", "head", "row"),
        **strides("starts", starts, "batch", "set", "row", "item"),
    }
    for axis, length in zip(("batch", "set", "row"), starts.shape, strict=False):
        if isinstance(length, int) and length == 1:
            arguments[f"starts_{axis}"] = 0
    constants = {
        **{"WIDTH": size, "D": padded(size), "BLOCK": block, "CHUNK": chunk, "STRIDE": stride, "LOCAL": local},
        **{"WINDOW": window, "STEPS": halvings(chunk), "HEADS": key_heads if share == "layer" else 1},
        **{"GROUP": 1 if share == "query" else group, "OWN": group if share == "query" else 1},
        "QUERIES": min(config.constants["QUERIES"], max(16, triton.next_power_of_2(asked))),
    }
    return [Launch(probe_chunks_kernel, (rows * parts, sets, batch), arguments, config.having(**constants))], scores


def why_not(q: Tensor, k: Tensor, *_: Any) -> str:
    """What the kernels of attention refuse."""
    return attention_tiles.why_not(q, k)


def examples() -> Iterator[tuple[Any, ...]]:
    """HiP's stages at 128k tokens and at 8k, choices of a head, of its group and of the layer; float32."""
    q, k = (torch.empty(1, heads, 131072, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    places = torch.empty(1, 1, 1, 512, dtype=torch.int64, device="meta")
    yield q, k, places, None, 256, 4, 64, 1024, "query"
    ends = torch.empty(1, dtype=torch.int64, device="meta")
    few = [x[:, :, :8192].contiguous() for x in (q, k)]
    yield *few, torch.empty(1, 8, 128, 1024, dtype=torch.int64, device="meta"), ends, 32, 4, 64, 1024, "kv"
    yield *few, torch.empty(1, 1, 128, 1024, dtype=torch.int64, device="meta"), None, 8, 1, 64, 1024, "layer", 4096
    small = torch.empty(2, 8, 4096, 128, dtype=torch.float32, device="meta")
    yield small, small, torch.empty(2, 8, 64, 256, dtype=torch.int64, device="meta"), None, 8, 1, 64, 64, "kv"


TWIN = Twin(work, examples, why_not)
