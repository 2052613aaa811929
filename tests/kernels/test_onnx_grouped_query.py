"""Attention over an index as ONNX Runtime's GroupQueryAttention: which form, the same numbers, and what has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from onnx_call import run_call
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tamis.kernels.onnx_grouped_query import dense_grouped_query
from tamis.op import OPS, OnnxCall

OP = OPS["block_sparse_attention"]


def heads(size: int = 8, tokens: int = 21, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(batch, count, tokens, size) for count in (4, 2, 2)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def arguments(qkv: list[Tensor], **said: Any) -> dict[str, Any]:
    """Those of the op, with nothing read but what is said."""
    numbers = {"share": "layer", "rows": 4, "width": 1, "sink": 0, "local": 0, "first": 0, "last": 0}
    none = {"tiles": None, "columns": None, "positions": None, "lengths": None}
    named = dict(zip(("q", "k", "v"), qkv, strict=True))
    return {**named, **none, **numbers, "scale": 0.3, "causal": True, "softcap": None, **said}


def held(name: str, **given: Any) -> Tensor:
    """What the form of this name answers, which is what the reference does."""
    call = OP.contrib(*given.values())
    assert isinstance(call, OnnxCall), call
    assert call.name == name
    expected = OP.reference(*given.values())
    (got,) = run_call(call, [expected])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    return got


@pytest.mark.parametrize("lengths", [None, [21, 9], [1, 21]])
@pytest.mark.parametrize(("local", "softcap"), [(1, None), (5, 1.5), (21, None), (100, 2.0)])
def test_a_window_is_one(local: int, softcap: float | None, lengths: list[int] | None) -> None:
    real = None if lengths is None else torch.tensor(lengths)
    got = held("CausalAttention", **arguments(heads(), local=local, softcap=softcap, lengths=real))
    if lengths is not None:
        assert not got[0, :, lengths[0] :].any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("share", ["layer", "kv", "query"])
def test_rows_that_name_no_key_give_zeros(share: str, causal: bool) -> None:
    sets = {"layer": 1, "kv": 2, "query": 4}[share]
    tiles = torch.full((2, sets, 6, 2), -1, dtype=torch.int32)
    tiles[0, :, 1] = torch.tensor([-1, 8], dtype=torch.int32)  # later keys alone
    tiles[1, -1, 2] = torch.tensor([10, 3], dtype=torch.int32)  # the first of a tile that reaches into the row
    given = arguments(heads(), tiles=tiles, share=share, rows=4, width=2, causal=causal, lengths=torch.tensor([21, 10]))
    got = held("ListedAttention", **given)
    assert not got[0, :, :4].any()
    assert bool(got[0, :, 4:8].any()) is not causal
    assert got[1, -1, 8:10].any()
    assert not got[1, :, 10:].any()


@pytest.mark.parametrize("part", ["sink", "first", "last", "local"])
@pytest.mark.parametrize("causal", [True, False])
def test_parts_that_no_list_names(part: str, causal: bool) -> None:
    columns = torch.tensor([[[[5, -1]] * 6] * 4], dtype=torch.int32).expand(2, -1, -1, -1)
    given = arguments(heads(), columns=columns, share="query", causal=causal, lengths=torch.tensor([21, 7]))
    held("ListedAndNearAttention", **{**given, part: 3})


def test_half_precision() -> None:
    given = arguments(heads(dtype=torch.float16), local=4)
    expected = OP.reference(*given.values())
    (got,) = run_call(OP.contrib(*given.values()), [expected])
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def test_what_has_no_form_says_why() -> None:
    assert "multiples of 8, and this is 12" in OP.contrib(*arguments(heads(12), local=4).values())
    assert "no CPU kernel for bfloat16" in OP.contrib(*arguments(heads(dtype=torch.bfloat16), local=4).values())
    q, k, _ = heads()
    assert "of one size, and these are 8 and 16" in OP.contrib(*arguments([q, k, heads(16)[2]], local=4).values())
    assert "scale of 0" in OP.contrib(*arguments(heads(), local=4, scale=0.0).values())
    order = torch.arange(21).expand(2, 2, -1)
    assert "in another order" in OP.contrib(*arguments(heads(), local=4, positions=order).values())


def dense(call: OnnxCall | str, name: str, q: Tensor, k: Tensor, v: Tensor, **said: Any) -> Tensor:
    """What the form of this name answers, which is what torch does."""
    assert isinstance(call, OnnxCall), call
    assert call.name == name
    expected = scaled_dot_product_attention(q, k, v, enable_gqa=True, **said)
    (got,) = run_call(call, [expected])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    return got


def test_dense_attention_that_is_causal_or_masked_by_pairs() -> None:
    qkv = heads()
    dense(dense_grouped_query(*qkv, None, 0.0, True), "CausalAttention", *qkv, is_causal=True)
    for shape in ((1, 1, 21, 21), (2, 4, 21, 21)):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
        mask[:, :, 3] = False
        got = dense(dense_grouped_query(*qkv, mask, scale=0.5), "MaskedAttention", *qkv, attn_mask=mask, scale=0.5)
        assert not got[:, :, 3].any()


def test_dense_attention_without_a_form_says_why() -> None:
    q, k, v = heads()
    assert "no causal attention" in dense_grouped_query(q, k, v)
    assert "no causal attention" in dense_grouped_query(q, k[:, :, :9], v[:, :, :9], None, 0.0, True)
    assert "no mask of tokens by tokens" in dense_grouped_query(q, k, v, torch.zeros(2, 1, 1, 21, dtype=torch.bool))
    assert "no mask of tokens by tokens" in dense_grouped_query(q, k, v, torch.zeros(21, 21))
    assert "at random" in dense_grouped_query(q, k, v, None, 0.1, True)
    assert "no axis of their own" in dense_grouped_query(q[0], k[0], v[0], None, 0.0, True)
