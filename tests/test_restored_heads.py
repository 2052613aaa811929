"""Models whose end needs every token of the encoder, ViTMAE's decoder and DPT's convolutions, against oracles.

Merging is undone before them, layer by layer as each value was; pruned tokens pass by if the pass says so, else they
are gone and the model is refused.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from oracle import reduced_forward
from rewriting import applied, run
from zoo_hf import RESTORED

from tamis.capture import capture
from tamis.errors import TokenAxisUnsupported
from tamis.graph import TokenGraph
from tamis.rewrite import Pipeline

FAMILIES = {family.name: family for family in RESTORED}


@cache
def captured(name: str) -> TokenGraph:
    args, kwargs = FAMILIES[name].inputs(2, dtype=torch.float64)
    return capture(FAMILIES[name].shared(torch.float64), args, kwargs=kwargs)


PASSING = (
    "random:r=2,passthrough=true",
    "evit:keep_ratio=0.7,fuse=false,passthrough=true",
    "evit:r=3,layers=[0],fuse=false,passthrough=true + tome:r=2,layers=[1] + random:r=1,layers=[2],passthrough=true",
)


@pytest.mark.parametrize("passes", ["tome:r=2", "tome:r=3,layers=[1]", "evit:keep_ratio=0.7", *PASSING])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_is_back_before_the_head(name: str, passes: str) -> None:
    family, result = FAMILIES[name], Pipeline.parse(passes).run(captured(name))
    assert len(result.graph.layers) == 0  # the result is a program; what was known was known of the original
    assert len(captured(name).layers) == family.layers
    for batch in (1, 3):
        inputs = family.inputs(batch, seed=batch, dtype=torch.float64)
        answer = reduced_forward(family, family.shared(torch.float64), inputs, passes)
        assert answer.stream.counts == [(o.layer, o.before, o.after) for o in applied(result)]
        for mine, expected in zip(run(result, inputs), answer.outputs, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_sees_that_tokens_merged(name: str) -> None:
    inputs = FAMILIES[name].inputs(2, dtype=torch.float64)
    mine, dense = run(Pipeline.parse("tome:r=2").run(captured(name)), inputs), run(captured(name), inputs)
    assert float((mine[0] - dense[0]).abs().max()) > 1e-3


LOST = "evit:r=2,layers=[0],fuse=false + random:r=2,layers=[1],passthrough=true"


@pytest.mark.parametrize("passes", ["random:r=2", "evit:keep_ratio=0.7,fuse=false", LOST])
@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_tokens_cannot_be_put_back(name: str, passes: str) -> None:
    with pytest.raises(TokenAxisUnsupported, match="dropped some for good"):
        Pipeline.parse(passes).run(captured(name))
