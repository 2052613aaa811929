"""summary_attention against its definition, query by query in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tamis.kernels.summary_attention import reference, samples

CASES = list(samples())


def by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_k: Tensor,
    summary_v: Tensor,
    bias: Tensor | None,
    hidden_from: Tensor,
    hidden_until: Tensor,
    lengths: Tensor | None,
    span: int,
    local: int,
    scale: float,
    causal: bool,
    softcap: float | None = None,
) -> Tensor:
    batch, heads, tokens = q.shape[:3]
    out = torch.zeros(batch, heads, tokens, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        end = tokens if lengths is None else int(lengths[b])
        start, stop = (x.expand(batch, -1)[b].tolist() for x in (hidden_from, hidden_until))
        for h in range(heads):
            own = h // (heads // k.shape[1])
            for i in range(end):
                first = max(0, i + 1 - local) // span * span
                last = i + 1 if causal else -(-(i + local) // span) * span
                near = range(first, min(last, end))
                far = [m for m, (a, z) in enumerate(zip(start, stop, strict=True)) if not a <= i < z]
                keys = torch.cat([k[b, own, list(near)], summary_k[b, h, far]]).double()
                values = torch.cat([v[b, own, list(near)], summary_v[b, h, far]]).double()
                logits = keys @ q[b, h, i].double() * scale
                if softcap is not None:
                    logits = torch.tanh(logits / softcap) * softcap
                if bias is not None:
                    logits[len(near) :] += bias.expand(batch, heads, -1)[b, h, far].double()
                out[b, h, i] = logits.softmax(0) @ values
    return out


@pytest.mark.parametrize("args", CASES, ids=range(len(CASES)))
def test_every_query_reads_what_it_should(args: tuple[Any, ...]) -> None:
    close = 2e-3 if args[0].dtype == torch.float16 else 1e-6
    torch.testing.assert_close(reference(*args).double(), by_definition(*args), rtol=close, atol=close)


def test_rows_and_spans_longer_than_the_prompt() -> None:
    args = [*CASES[0]]
    for span, local in ((1, 1), (1, 100), (100, 1), (70, 90), (7, 3)):
        for causal in (True, False):
            args[9:] = [span, local, 0.3, causal]
            torch.testing.assert_close(reference(*args).double(), by_definition(*args), rtol=1e-6, atol=1e-6)


def test_a_bias_of_minus_infinity_hides_and_padding_gets_zero() -> None:
    q, k, v, far_k, far_v = CASES[0][:5]
    many, ends = far_k.shape[2], torch.tensor([0, 5])
    nothing, start = torch.full((1, 1, many), -torch.inf), torch.zeros(1, many).long()
    by_bias = reference(q, k, v, far_k, far_v, nothing, start, start, ends, 4, 1, 0.3, True)
    by_place = reference(q, k, v, far_k, far_v, None, start, start + 99, ends, 4, 1, 0.3, True)
    assert torch.equal(by_bias, by_place)
    assert torch.equal(by_bias[0], torch.zeros_like(by_bias[0]))
    assert torch.equal(by_bias[1, :, 5:], torch.zeros_like(by_bias[1, :, 5:]))
    assert by_bias[1, :, :5].abs().sum(-1).min() > 0
