"""The kernel of `valid_slots`: one launch, one program per row.  Inlined, a sum and a comparison would be two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...counts import HALF, CountRule, at_most
from .architecture import Architecture
from .launch import Launch, Twin, Work
from .selection import COUNTS, removed_of, rule_arguments, rule_does_not_fit


@triton.jit(do_not_specialize=COUNTS)
def valid_kernel(
    valid, result, tokens, out, prefix, limit, slope_0, offset_0, divisor_0, slope_1, offset_1, divisor_1,
    valid_batch, valid_token, ADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """result[b, j] = j < the slots of row b; grid (batch)."""
    batch = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, tokens, TILE):
        token = start + tl.arange(0, TILE)
        at = valid + batch * valid_batch + token * valid_token
        count += tl.sum(tl.load(at, mask=token < tokens, other=0).to(tl.int32), 0)
    removed = removed_of(count, prefix, limit, slope_0, offset_0, divisor_0, slope_1, offset_1, divisor_1)
    slots = count - removed + ADDED * tl.minimum(removed, 1)
    for start in range(0, out, TILE):
        slot = start + tl.arange(0, TILE)
        tl.store(result + batch * out + slot, slot < slots, mask=slot < out)


def work(architecture: Architecture, valid: Tensor, out: Any, prefix: int, rule: list[int]) -> Work:
    """One launch."""
    result = valid.new_empty((valid.shape[0], out))
    arguments = {
        "valid": valid,
        "result": result,
        "tokens": valid.shape[1],
        "out": out,
        "valid_batch": valid.stride(0),
        "valid_token": valid.stride(1),
        **rule_arguments(prefix, rule),
    }
    config = architecture.config("valid_kernel").having(ADDED=rule[0])
    return [Launch(valid_kernel, (valid.shape[0],), arguments, config)], result


def why_not(valid: Tensor, out: Any, prefix: int, rule: list[int]) -> str:
    """Rules with more terms than a kernel takes."""
    return rule_does_not_fit(rule)


def examples() -> Iterator[tuple[Any, ...]]:
    """A batch of texts."""
    rule = CountRule(1, (at_most(13), HALF))
    yield torch.empty(64, 512, dtype=torch.bool, device="meta"), rule.out(512), 1, rule.flat()


TWIN = Twin(work, examples, why_not)
