"""The rules that an attention index keeps: every method's does, and a broken one is said to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from index_cases import drawn_case
from sparse_oracle import attended, drawn, expanded
from sparse_registry import every_index, small

from tamis.kernels.check_index import check_index
from tamis.kernels.sparse_pairs import Pairs
from tamis.passes.sparse import arguments
from tamis.sparse_errors import IndexBroken


@every_index
def test_the_index_of_every_method_keeps_the_rules(name: str) -> None:
    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(st.integers(1, 70), st.integers(0, 99), st.booleans())
    def check(tokens: int, seed: int, padded: bool) -> None:
        heads = drawn(seed, tokens, size=8, lengths=[tokens, max(1, tokens // 2)] if padded else None)
        index, *_ = Pairs.of(*arguments(small(name).index(heads), heads)[3:])
        check_index(index, tokens, 4, 2)

    check()


BROKEN = [
    ({"tiles": [[0, 3]]}, "tiles of a row are ascending and 4 or more apart"),
    ({"tiles": [[4, 0]]}, "tiles of a row are ascending"),
    ({"tiles": [[-1, 0]]}, "unused tiles come last"),
    ({"tiles": [[0, 5]], "aligned": True}, "aligned tiles begin at multiples of 4"),
    ({"tiles": [[4, -1], [0, -1]], "rows": 4}, "tiles begin before the last query"),
    ({"tiles": [[0, 40]]}, "tiles begin at places 0 to 7"),
    ({"columns": [[3, -1, 1]]}, "columns of a row are ascending"),
    ({"columns": [[1, 1]]}, "columns of a row are ascending and 1 or more apart"),
    ({"tiles": [[0, -1]], "columns": [[3, -1]]}, "no column is in a tile"),
    ({"tiles": [[4, -1]]}, "every real token reads a key"),
    ({"tiles": [[0, -1]], "rows": 4}, "2 rows of 4 are expected"),
    ({"positions": [[0, 0, 2, 3, 4, 5, 6, 7]]}, "positions name every token once"),
]


@pytest.mark.parametrize(("parts", "rule"), BROKEN, ids=lambda value: value if isinstance(value, str) else None)
def test_a_broken_index_is_said_to_be(parts: dict[str, Any], rule: str) -> None:
    whole = Pairs(None, None, None, None, "layer", 8, 4, 0, 0, 0, 0, True)
    lists: dict[str, Any] = {
        name: torch.tensor(value, dtype=torch.int32)[None] if name == "positions" else torch.tensor([[value]]).int()
        for name, value in parts.items()
        if name != "rows"
    }
    index = replace(whole, **lists, rows=parts.get("rows", 8), sink=1 if "positions" in parts else 0)
    with pytest.raises(IndexBroken, match=rule):
        check_index(index, 8, 1, 1)


def test_drawn_indices_are_checked_where_the_environment_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 1, 8, 4, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    tiles = torch.tensor([0, 3], dtype=torch.int32).reshape(1, 1, 1, 2)
    call = (q, k, v, tiles, None, None, None, "layer", 8, 4, 0, 0, 0, 0, 0.5, True)
    for op in (torch.ops.tamis.block_sparse_attention, torch.ops.tamis.block_sparse_attention_with_lse):
        monkeypatch.delenv("TAMIS_CHECK_INDEX", raising=False)
        op(*call)
        monkeypatch.setenv("TAMIS_CHECK_INDEX", "1")
        with pytest.raises(IndexBroken, match=r"ascending.*at \[0, 0, 0, 0\] there is \[0, 3\]"):
            op(*call)


@pytest.mark.parametrize("name", ["lm-infinite", "infllm", "streaming-llm"])
def test_one_of_two_parts_need_not_hold_a_key_for_every_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAMIS_CHECK_INDEX", "1")
    more = {"positions": "slot"} if name == "streaming-llm" else {}
    heads, method = drawn(0, 40), small(name, sink=0, **more)
    seen = expanded(method.index(heads), heads)
    torch.testing.assert_close(method.attend(heads).double(), attended(heads, seen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_whole_indices_pass(seed: int) -> None:
    case = drawn_case(seed)
    index, *_ = Pairs.of(*case.args[3:])
    tokens = case.q.shape[2]
    full = replace(index, first=tokens, causal=False)  # what they leave unread is not what is asked here
    check_index(full, tokens, case.q.shape[1], case.k.shape[1])
