"""match_keys: bipartite_match on the mean of the heads' keys, which is what ToMe measures similarity on.

keys    [B, H, N, D] float   of one attention site, in any memory layout
valid, out, prefix, rule     as for bipartite_match, as are the results: slot, leader, moved

    metric[b, i] = sum over h of keys[b, h, i] / H, in float32 (float64 for float64)

Only lowering for GPUs makes it (`lowering/fusion_match.py`), so it has no form in ONNX: apart, the mean is a launch and
a pass of its own over the keys, and writes four bytes per number where the keys may have two.  Raises nothing of its
own.  Source: methods card 1.1 (Bolya et al. 2023); ties and guards as in bipartite_match.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..counts import HALF, CountRule, at_most, keep_at_least
from ..op import Op, define_op
from .bipartite_match import fake as fake_match
from .bipartite_match import flops as flops_of_match
from .bipartite_match import reference as match
from .precision import compute_dtype

Plan = tuple[Tensor, Tensor, Tensor]


def reference(keys: Tensor, valid: Tensor | None, out: int, prefix: int, rule: list[int]) -> Plan:
    """See the module."""
    return match(keys.mean(1, dtype=compute_dtype(keys)), valid, out, prefix, rule)


def fake(keys: Tensor, valid: Tensor | None, out: int, prefix: int, rule: list[int]) -> Plan:
    """Shape rule."""
    return fake_match(keys[:, 0], valid, out, prefix, rule)


def flops(keys: Any, valid: Any, out: int, prefix: int, rule: list[int], **_: Any) -> int:
    """The similarity product; the mean is not counted, as it is not elsewhere."""
    batch, _heads, tokens, width = keys
    return flops_of_match((batch, tokens, width), valid, out, prefix, rule)


def samples() -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the generic tests."""
    generator = torch.Generator().manual_seed(0)
    for (batch, heads, tokens, width), prefix, terms, dtype in [
        ((2, 3, 13, 16), 1, (at_most(4), HALF), torch.float32),
        ((2, 1, 37, 20), 0, (keep_at_least(0.7), HALF), torch.float16),
        ((1, 12, 29, 8), 2, (at_most(9), HALF), torch.bfloat16),
        ((0, 2, 8, 4), 1, (at_most(2), HALF), torch.float32),
        ((2, 2, 1, 4), 1, (at_most(2), HALF), torch.float32),
    ]:
        keys = torch.randn(batch, tokens, heads, width, generator=generator).to(dtype).transpose(1, 2)
        rule = CountRule(prefix, terms)
        yield keys, None, rule.out(tokens), prefix, rule.flat()
        valid = torch.rand(batch, tokens, generator=generator) < 0.8
        yield keys, valid, rule.out(tokens), prefix, rule.flat()


MATCH_KEYS = define_op(
    Op(
        name="match_keys",
        schema="(Tensor keys, Tensor? valid, SymInt out, int prefix, int[] rule)"
        " -> (Tensor slot, Tensor leader, Tensor moved)",
        reference=reference,
        fake=fake,
        onnx=None,
        flops=flops,
        samples=samples,
        triton="match_keys",
    )
)
