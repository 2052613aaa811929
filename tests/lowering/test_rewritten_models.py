"""Inlining on real rewritten models, where counts are nodes, symbols meet numbers, and examples coincide by chance."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.utils import _pytree as pytree

from tamis.capture import capture
from tamis.lowering.callables import InductorModule
from tamis.lowering.inline import inline_ops
from tamis.rewrite import Pipeline

CASES = [
    ("vit_mean", "tome:r=1", True),  # one token leaves: its axis has size 1
    ("vit_mean", "tome:r=[3,1,2]", True),
    ("vit_mean", "evit:keep_ratio=0.95,fuse=true", False),
    ("bert", "tome:r=1", False),
    ("bert", "evit:keep_ratio=0.95,fuse=true", True),  # one leaves, one is added: as many tokens as before, here
    ("bert", "random:keep_ratio=0.5", True),
]


@pytest.fixture(scope="module")
def graphs():
    return {name: capture(zoo.FAMILIES[name].shared(), *zoo.FAMILIES[name].inputs(batch=2)) for name, _, _ in CASES}


def inputs_of(family):
    calls = [family.inputs(batch=3, seed=1), family.inputs(batch=1, seed=2)]
    if "length" in family.dynamic:
        calls += [family.inputs(batch=2, length=60), family.inputs(batch=2, length=6)]
    return calls


def counts(program):
    return [str(node.meta["val"]) for node in program.graph.nodes if node.name.startswith("token_count")]


@pytest.mark.parametrize(("name", "passes", "symbolic"), CASES)
def test_inlined_models_compute_the_same_at_every_size(graphs, name, passes, symbolic):
    program = Pipeline.parse(passes).run(graphs[name], symbolic_counts=symbolic).graph.program
    before = counts(program)
    inlined = inline_ops(program).module()
    compiled = InductorModule(program, "default")
    compiled.compiled = compiled.inner  # what Inductor is given, run as it is
    assert counts(program) == before
    for args, kwargs in inputs_of(zoo.FAMILIES[name]):
        with torch.no_grad():
            expected = pytree.tree_leaves(program.module()(*args, **kwargs))
        for module in (inlined, compiled):
            with torch.no_grad():
                got = pytree.tree_leaves(module(*args, **kwargs))
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
