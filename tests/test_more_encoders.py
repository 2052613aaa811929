"""Encoders that are one of the zoo's but for what stands in front of their layers."""

from __future__ import annotations

import pytest
import torch
from oracle import reduced_forward
from rewriting import applied, assert_equal_outputs, run
from zoo_speech import ALIKE

from tamis.capture import capture
from tamis.rewrite import Pipeline

FAMILIES = {family.name: family for family in ALIKE}


@pytest.mark.parametrize("name", FAMILIES)
def test_they_equal_the_oracle(name: str) -> None:
    family = FAMILIES[name]
    model = family.shared(torch.float64)
    args, kwargs = family.inputs(2, dtype=torch.float64)
    graph = capture(model, args, kwargs=kwargs)
    for passes in ("tome:r=3", "random:r=2"):
        result, inputs = Pipeline.parse(passes).run(graph), family.inputs(3, dtype=torch.float64)
        answer = reduced_forward(family, model, inputs, passes)
        assert answer.stream.counts == [(o.layer, o.before, o.after) for o in applied(result)]
        assert_equal_outputs(run(result, inputs), answer.outputs, 1e-5)
