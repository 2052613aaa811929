"""Fusions on graphs of real models: what fired where, and that the fused graph computes the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from rewriting import rewritten
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from zoo import FAMILIES

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.capture.program import copied, rebuild
from tamis.lowering.fusion import Fired, fuse
from tamis.lowering.splice import op_of

MERGED = "add + merge_tokens + layer_norm + log"
LAST = "add + merge_tokens + layer_norm"
PRUNED = "add + reduce_tokens + layer_norm"
POST_NORM = "add + layer_norm + merge_tokens"
EXPECTED = {
    ("vit_small", "tome:r=13"): [("blocks.0", MERGED), ("blocks.1", LAST)],
    ("vit_small", "evit:keep_ratio=0.7,fuse=true"): [("blocks.0", PRUNED), ("blocks.1", PRUNED)],
    ("vit_small", "random:keep_ratio=0.7"): [("blocks.0", PRUNED), ("blocks.1", PRUNED)],
    ("deit_distilled", "tome:r=5"): [("blocks.0", MERGED), ("blocks.1", MERGED), ("blocks.2", LAST)],
    ("dinov2_reg4", "tome:r=4"): [
        ("blocks.0", f"mul + {MERGED}"),
        ("blocks.1", f"mul + {MERGED}"),
        ("blocks.2", f"mul + {LAST}"),
    ],
    ("hf_vit", "tome:r=3"): [("layers.0", MERGED), ("layers.1", MERGED), ("layers.2", LAST)],
    ("modernbert", "tome:keep_ratio=0.8"): [
        ("layers.0", "add + merge_tokens + layer_norm + where + log"),
        ("layers.1", "add + merge_tokens + layer_norm + where + log"),
        ("layers.2", LAST),
    ],
    ("bert", "tome:keep_ratio=0.7"): [
        ("encoder.layer.0.attention.output.LayerNorm", f"{POST_NORM} + where + log"),
        ("encoder.layer.1.attention.output.LayerNorm", f"{POST_NORM} + where + log"),
        ("encoder.layer.2.attention.output.LayerNorm", POST_NORM),
    ],
}
every_model = pytest.mark.parametrize(("family", "passes"), EXPECTED)


@cache
def fused(family: str, passes: str) -> tuple[ExportedProgram, list[Fired]]:
    return fused_program(rewritten(family, passes, torch.float32).graph.program)


def fused_program(program: ExportedProgram) -> tuple[ExportedProgram, list[Fired]]:
    module = copied(program)
    fired = [one for one in fuse(module.graph) if one.fusion == "merge"]
    module.recompile()
    return rebuild(program, module), fired


@every_model
def test_what_fires_in_each_layer(family, passes):
    program, fired = fused(family, passes)
    assert [(one.module, one.what) for one in fired] == EXPECTED[family, passes]
    assert [one.fired for one in fired] == [bool(what) for _, what in EXPECTED[family, passes]]
    ops = [op.name for node in program.graph.nodes if (op := op_of(node))]
    assert ops.count("add_reduce_norm") == sum(one.fired for one in fired)
    assert ops.count("merge_tokens") + ops.count("reduce_tokens") == sum(not one.fired for one in fired)


@every_model
def test_nothing_is_left_out(family, passes):
    assert [one.why for one in fused(family, passes)[1]] == [""] * len(EXPECTED[family, passes])


@every_model
def test_the_fused_graph_computes_the_same(family, passes):
    program, _ = fused(family, passes)
    plain = rewritten(family, passes, torch.float32).graph.program
    for batch in (1, 3):
        args, kwargs = FAMILIES[family].inputs(batch, dtype=torch.float32)
        with torch.no_grad():
            expected, got = (pytree.tree_leaves(one.module()(*args, **kwargs)) for one in (plain, program))
        for have, want in zip(got, expected, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-6)


class Block(nn.Module):
    """Residual add, merging of the last of five tokens into the first, norm; `how` varies what is fused."""

    def __init__(self, how: str = "", width: int = 8) -> None:
        super().__init__()
        self.how = how
        self.norm = nn.RMSNorm(width, eps=1e-5) if how == "rms" else nn.LayerNorm(width)
        self.gamma = nn.Parameter(torch.linspace(0.5, 2.0, width))
        self.before = nn.LayerNorm(width)
        index = torch.tensor([[0, 1, 2, 3, 0]]), torch.tensor([[0, 1, 2, 3]]), torch.tensor([[4]])
        for name, value in zip(("slot", "leader", "moved"), index, strict=True):
            self.register_buffer(name, value)

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, ...]:
        if self.how == "broadcast":
            branch = branch[:, :1]
        total = torch.add(x, branch, alpha=2) if self.how == "alpha" else x + self.scaled(branch)
        if self.how.startswith("norm before"):
            total = self.before(total)
        plan = (one.expand(x.shape[0], -1) for one in (self.slot, self.leader, self.moved))
        y, mass = torch.ops.tamis.merge_tokens(total, *plan, None, False)
        normed = self.normed(y)
        more = (total.sum(),) if self.how.endswith("read twice") else ()
        return y, normed, mass, mass.log(), *more

    def scaled(self, branch: Tensor) -> Tensor:
        return self.gamma * branch if self.how == "scaled" else branch

    def normed(self, y: Tensor) -> Tensor:
        if self.how == "later weights":
            return F.layer_norm(y, y.shape[2:], self.gamma * y.mean(), None, 1e-6)
        if self.how == "whole norm":
            return F.layer_norm(y, y.shape[1:], None, None, 1e-6)
        return y * 2 if self.how == "no norm" else self.norm(y)


def fire(how: str, width: int = 8, dtype: torch.dtype = torch.float32) -> Fired:
    """Fuse a block, check that it computes the same, and return what fired."""
    model = Block(how, width).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(3, 5, width, generator=generator).to(dtype) for _ in range(2))
    batch = torch.export.Dim("batch", min=2, max=9)
    with torch.no_grad():
        plain = torch.export.export(model, inputs, dynamic_shapes=({0: batch}, {0: batch}))
        program, (fired,) = fused_program(plain)
        for have, want in zip(program.module()(*inputs), model(*inputs), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-6)
    return fired


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("", MERGED),
        ("scaled", f"mul + {MERGED}"),
        ("rms", MERGED.replace("layer", "rms")),
        ("no norm", "add + merge_tokens + log"),
        ("whole norm", "add + merge_tokens + log"),
        ("later weights", "add + merge_tokens + log"),
        ("sum read twice", "merge_tokens + layer_norm + log"),
        ("norm before", "add + layer_norm + merge_tokens + log"),
        ("norm before read twice", "merge_tokens + layer_norm + log"),
        ("broadcast", "merge_tokens + layer_norm + log"),
        ("alpha", "merge_tokens + layer_norm + log"),
    ],
)
def test_variants(how, what):
    assert fire(how).what == what


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("sum read twice", "the residual add add is read by sum_1 too"),
        (
            "norm before read twice",
            "the norm layer_norm is read by sum_1 too; no residual add: the tokens are layer_norm",
        ),
        ("broadcast", "no residual add: the tokens are add"),
        ("later weights", "the weights of layer_norm are computed later"),
        ("no norm", "no norm after it: the tokens go to mul, output"),
    ],
)
def test_reasons(how, why):
    assert fire(how).why == why


def test_what_the_kernel_does_not_serve_is_left_alone():
    assert not fire("", dtype=torch.float64).fired
    wide = fire("", width=8200)
    assert (wide.fired, wide.why) == (False, "its norm is of 8200 features, and one program holds 8192")


def test_answers_are_plain_data():
    one: Any = fire("no norm").as_dict()
    assert (one["fusion"], one["fired"], one["node"]) == ("merge", True, "merge_tokens")
    assert str(fire("broadcast")).startswith("merge at top level: merge_tokens + layer_norm + log (no residual add")
