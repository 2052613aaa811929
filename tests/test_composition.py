"""Two reductions in one recipe: counts, provenance and outputs are those of one after the other, by hand.

Every pair of registered methods, the first after layer 1 of 4 and the second after layer 2.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from check_streams import made as made_of
from check_streams import reductions
from oracle import Answer, reduced_forward
from rewriting import applied, assert_equal_outputs, run
from torch import Tensor
from zoo import Family, image_inputs, timm_model

from tamis.capture import capture
from tamis.graph import TokenGraph
from tamis.lowering.onnx import export_onnx
from tamis.passes.reduction import TokenReduction
from tamis.recipe_errors import PassesExclude
from tamis.rewrite import Pipeline, Result, parse_passes

SIZES = {"embed_dim": 48, "num_heads": 3, "num_classes": 10, "img_size": 128}
FAMILY = Family("vit_four", timm_model("vit_tiny_patch16_224", **SIZES), image_inputs(128), 1, 65, layers=4)
METHODS = reductions()
PAIRS = [(first, second) for first in METHODS for second in METHODS]
QUICK = [
    pair for pair in PAIRS if pair[1] == "tome" or pair in (("evit", "random"), ("tome", "evit"), ("pool", "evit"))
]
CASES = [pytest.param(*pair, marks=[] if pair in QUICK else [pytest.mark.full]) for pair in PAIRS]


@cache
def captured(dtype: torch.dtype = torch.float64) -> TokenGraph:
    args, _ = FAMILY.inputs(2, dtype=dtype)
    return capture(FAMILY.shared(dtype), args)


def made(name: str, layer: int, ratio: float) -> TokenReduction:
    return made_of(METHODS[name], [layer], channels=SIZES["embed_dim"], keep_ratio=ratio)


def by_hand(methods: Any, inputs: Any) -> Answer:
    return reduced_forward(FAMILY, FAMILY.shared(torch.float64), inputs, methods)


def places(answer: Answer, batch: int) -> Tensor:
    """Where the oracle says that every original token went."""
    source = answer.stream.source
    return torch.arange(FAMILY.tokens).expand(batch, -1) if source is None else source


def assert_follows(result: Result, methods: Any) -> Answer:
    """Outputs, map and counts of a rewrite are those of the forward by hand; its answer for three rows."""
    inputs = FAMILY.inputs(3, seed=3, dtype=torch.float64)
    answer = by_hand(methods, inputs)
    *outputs, went = run(result, inputs)
    assert_equal_outputs(outputs, answer.outputs, 1e-5)
    assert torch.equal(went, places(answer, 3))
    assert answer.stream.counts == [(o.layer, o.before, o.after) for o in applied(result)]
    return answer


@pytest.mark.parametrize(("first", "second"), CASES)
def test_a_pair_is_one_after_the_other(first: str, second: str) -> None:
    methods = [made(first, 1, 0.8), made(second, 2, 0.6)]  # DynamicViT's ratio is of all tokens
    result = Pipeline(tuple(methods)).run(captured(), allow_noop=True, token_map=True)
    done = [o.pass_name for o in applied(result)]
    assert done[0] == str(methods[0])
    skipped = [o for o in result.outcomes if not o.applied]
    assert all("grid" in o.reason or "nothing can leave" in o.reason for o in skipped)
    answer = assert_follows(result, [m for m in methods if str(m) in done])
    last = answer.stream.plans[-1]
    for row, valid in zip(places(answer, 3), last.valid if last.valid is not None else [None] * 3, strict=True):
        slots = set(row.tolist()) - {-1}
        assert slots == set(range(last.out)) if valid is None else set(valid.nonzero().flatten().tolist())
        assert row[0] == 0
        assert (-1 in row) == any(plan.drops for plan in answer.stream.plans)


@pytest.mark.parametrize(
    "passes", ["random:r=6,layers=[0] + tome:r=5,layers=[1,2]", "tome:r=5,layers=[0,1] + tome:r=6"]
)
def test_sizes_count_the_original_tokens_that_are_left(passes: str) -> None:
    result = Pipeline.parse(passes).run(captured(), token_map=True)
    answer = assert_follows(result, parse_passes(passes))
    for sizes, row in zip(answer.stream.sizes, places(answer, 3), strict=True):
        assert sizes.tolist() == torch.bincount(row[row >= 0], minlength=len(sizes)).tolist()


SAME = ("random:r=6,layers=[1]", "tome:r=5,layers=[1]")


@pytest.mark.parametrize("passes", [" + ".join(SAME), " + ".join(SAME[::-1])])
def test_at_one_place_passes_run_in_the_order_of_the_recipe(passes: str) -> None:
    result = Pipeline.parse(passes).run(captured(), token_map=True)
    assert [o.pass_name for o in applied(result)] == passes.split(" + ")
    assert_follows(result, parse_passes(passes))


@pytest.mark.parametrize("first", ["evit:keep_ratio=0.75,layers=[0]", "pool:window=2,layers=[0]"])
def test_onnx_runtime_follows_a_pair(first: str, tmp_path: Path) -> None:
    graph = captured(torch.float32)
    program = Pipeline.parse(f"{first} + tome:r=3,layers=[1]").run(graph, token_map=True).graph.program
    export_onnx(program, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (images,), _ = FAMILY.inputs(3, seed=3)
    with torch.no_grad():
        logits, went = program.module()(images)
    got, got_map = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert np.abs(got - logits.numpy()).max() <= 1e-4 * float(logits.abs().max())
    assert np.array_equal(got_map, went.numpy())


@pytest.mark.parametrize(
    ("first", "second"),
    [("tome:r=3", "tomesd:layers=[0]"), ("tomesd:layers=[0]", "tome:r=3"), ("random:r=2", "bigbird")],
)
def test_families_that_each_need_an_original_exclude_each_other(first: str, second: str) -> None:
    with pytest.raises(PassesExclude) as caught:
        Pipeline.parse(f"{first} + {second}").run(captured())
    names = [str(Pipeline.parse(one)) for one in (second, first)]
    assert str(caught.value).startswith(f"{names[0]}: cannot run on what {names[1]} made of the model;")
