"""Every sparse attention method of tamis, with a budget that leaves much out: tests find a method by its existing."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tamis.passes.sparse import SparseAttention
from tamis.registry import origin_of, registered_passes
from tamis.rewrite import build_pass

SMALL: dict[str, dict[str, Any]] = {  # budgets that leave much out of a hundred tokens
    "a-shape": {"sink": 3, "local": 9},
    "bigbird": {"block": 8, "random": 1},
    "block-sparse": {"density": 0.3, "block": 8},
    "cca": {"span": 4, "local": 6},
    "combiner": {"span": 4},
    "dilated": {"step": 3, "local": 4, "sink": 2, "first": 1},
    "flex-prefill": {"block": 8, "min_budget": 8, "gamma": 0.6, "tau": 0.3},
    "hip": {"sink": 3, "local": 9, "chunks": [8, 4], "keeps": [40, 16], "strides": [2, 1], "block": 8},
    "landmark": {"mem_freq": 4, "top_k": 3},
    "infllm": {"sink": 3, "local": 8, "blocks": 2, "block": 6, "stand_ins": 2, "chunk": 4},
    "lm-infinite": {"sink": 3, "local": 9},
    "longformer": {"window": 12, "first": 2},
    "pbs": {"density": 0.5, "block": 8, "segment": 16, "threshold": 0.4},
    "random-tiles": {"density": 0.3, "block": 8, "share": "layer"},  # a draw of its own goes by the head's place
    "routing": {"clusters": 6, "window": 12},
    "sparge": {"block": 8, "threshold": 0.7, "similarity": 0.05, "density": 0.5},
    "streaming-llm": {"local": 12},
    "tri-shape": {"sink": 3, "local": 9, "last": 5},
    "vertical-slash": {"columns": 8, "slashes": 6, "sink": 2, "near": 3, "estimate": 8, "block": 8},
    "x-attention": {"density": 0.4, "block": 8, "stride": 4},
}


@cache
def methods() -> dict[str, type[SparseAttention]]:
    known = registered_passes().items()
    return {name: cls for name, cls in known if issubclass(cls, SparseAttention) and origin_of(cls) == "tamis"}


def small(name: str, **more: Any) -> Any:
    return build_pass(name, {**SMALL[name], **more})


every_method = pytest.mark.parametrize("name", SMALL)
every_index = pytest.mark.parametrize("name", [name for name in SMALL if methods()[name].indexed])
