"""A toy op with what real ones have: a count, an optional tensor, several results; and a program that calls it."""

from __future__ import annotations

from typing import Any

import onnxscript
import pytest
import torch
from onnxscript import FLOAT, INT64
from onnxscript import opset18 as onnx_op
from torch import nn

from tamis.op import OPS, OnnxCall, Op, define_op

DOMAIN = onnxscript.values.Opset("tamis", 1)


def reference(x: torch.Tensor, weight: torch.Tensor | None, out: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `out` tokens of x [B, N, C], times weight [C] where given, and their mean over channels [B, out]."""
    kept = x[:, :out]
    kept = kept * 2 if weight is None else kept * weight
    return kept, kept.mean(-1)


def fake(x: torch.Tensor, weight: torch.Tensor | None, out: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], out, x.shape[2]), x.new_empty(x.shape[0], out)


@onnxscript.script(DOMAIN, default_opset=onnx_op)
def ToyTake(x: FLOAT["B", "N", "C"], weight: FLOAT["C"], out: INT64) -> tuple[FLOAT, FLOAT]:  # noqa: F821
    zero = onnx_op.Constant(value_ints=[0])
    one = onnx_op.Constant(value_ints=[1])
    kept = onnx_op.Slice(x, zero, onnx_op.Reshape(out, one), one) * weight
    last = onnx_op.Constant(value_ints=[-1])
    return kept, onnx_op.ReduceMean(kept, last, keepdims=0)


def to_onnx(x: torch.Tensor, weight: torch.Tensor | None, out: Any) -> OnnxCall:
    factor = torch.full((x.shape[2],), 2.0) if weight is None else weight
    return OnnxCall(ToyTake, [x, factor, out], {})


if "toy_take" not in OPS:
    define_op(
        Op(
            name="toy_take",
            schema="(Tensor x, Tensor? weight, SymInt out) -> (Tensor, Tensor)",
            reference=reference,
            fake=fake,
            onnx=to_onnx,
            flops=lambda x, weight, out, **_: x[0] * out * x[2],
            samples=lambda: [(torch.ones(2, 5, 3), None, 3)],
        )
    )


class Toy(nn.Module):
    """Attention, layer norm, linear and GELU around two cuts of `remove` tokens."""

    def __init__(self, channels: int = 8, remove: int = 2, weighted: bool = True, dynamic: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, channels)
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, channels)) if weighted else None
        self.remove, self.dynamic = remove, dynamic

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        rule = [0, 0, self.remove, 1]
        out = torch.ops.tamis.token_count(x, 1, 1, rule) if self.dynamic else x.shape[1] - self.remove
        kept, mean = torch.ops.tamis.toy_take(x, self.weight, out)
        return kept + mean.unsqueeze(-1)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.cut(tokens)
        h = self.norm(x)[:, None]
        x = x + nn.functional.scaled_dot_product_attention(h, h, h)[:, 0]
        x = self.cut(x)
        x = x + nn.functional.gelu(self.linear(x))
        return {"last_hidden_state": x, "pooled": x.mean(1)}


def export_toy(length: bool = False, **options: Any) -> torch.export.ExportedProgram:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251
        model = Toy(**options).eval()
    dims = {0: torch.export.Dim("batch", min=1, max=64)}
    if length:
        dims[1] = torch.export.Dim("sequence", min=8, max=64)
    with torch.no_grad():
        return torch.export.export(model, (tokens(2),), dynamic_shapes=(dims,))


def tokens(batch: int, length: int = 12, channels: int = 8) -> torch.Tensor:
    return torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(batch * 100 + length))


@pytest.fixture(params=["static", "dynamic length"])
def program(request: pytest.FixtureRequest) -> torch.export.ExportedProgram:
    return export_toy(length=request.param == "dynamic length")


@pytest.fixture()
def make_program() -> Any:
    return export_toy


@pytest.fixture()
def make_tokens() -> Any:
    return tokens
