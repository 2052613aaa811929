"""A toy op with what real ones have: a count, an optional tensor, several results; and a program that calls it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import onnxscript
import pytest
import torch
import zoo
from onnxscript import opset18 as onnx_op
from torch import nn

from tamis.capture.program import rebuild
from tamis.kernels.opset import TAMIS
from tamis.kernels.symbols import symbolic_counts
from tamis.op import OPS, OnnxCall, Op, define_op
from tamis.passes.retrace import retrace


def reference(x: torch.Tensor, weight: torch.Tensor | None, out: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `out` tokens of x [B, N, C], times weight [C] where given, and their mean over channels [B, out]."""
    kept = x[:, :out]
    kept = kept * 2 if weight is None else kept * weight
    return kept, kept.mean(-1)


def fake(x: torch.Tensor, weight: torch.Tensor | None, out: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], out, x.shape[2]), x.new_empty(x.shape[0], out)


@onnxscript.script(TAMIS, default_opset=onnx_op)
def ToyTake(x, weight, out):
    zero = onnx_op.Constant(value_ints=[0])
    one = onnx_op.Constant(value_ints=[1])
    kept = onnx_op.Slice(x, zero, onnx_op.Reshape(out, one), one) * weight
    last = onnx_op.Constant(value_ints=[-1])
    return kept, onnx_op.ReduceMean(kept, last, keepdims=0)


@onnxscript.script(TAMIS, default_opset=onnx_op)
def ToyTakeDouble(x, out):
    zero = onnx_op.Constant(value_ints=[0])
    one = onnx_op.Constant(value_ints=[1])
    kept = onnx_op.Slice(x, zero, onnx_op.Reshape(out, one), one) * 2.0
    last = onnx_op.Constant(value_ints=[-1])
    return kept, onnx_op.ReduceMean(kept, last, keepdims=0)


def to_onnx(x: torch.Tensor, weight: torch.Tensor | None, out: Any) -> OnnxCall:
    return OnnxCall(ToyTakeDouble, [x, out], {}) if weight is None else OnnxCall(ToyTake, [x, weight, out], {})


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
    """Layers of a cut that removes two tokens, attention, layer norm, linear and GELU."""

    def __init__(self, layers: int, weighted: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.weight = nn.Parameter(torch.zeros(8)) if weighted else None

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        kept, mean = torch.ops.tamis.toy_take(x, self.weight, x.shape[1] - 2)
        return kept + mean.unsqueeze(-1)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        x = tokens
        for linear in self.linears:
            x = self.cut(x)
            h = self.norm(x)[:, None]
            x = x + nn.functional.scaled_dot_product_attention(h, h, h)[:, 0]
            x = x + nn.functional.gelu(linear(x))
        return {"last_hidden_state": x, "pooled": x.mean(1)}


class Recount(torch.fx.Interpreter):
    """Cuts ask token_count for their count, as rewritten programs do."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.tamis.toy_take.default:
            args = (*args[:2], torch.ops.tamis.token_count(args[0], 1, 1, [0, 0, 2, 1]))
        return super().call_function(target, args, kwargs)


def export_toy(
    *, length: bool = False, layers: int = 2, weighted: bool = True, dynamic: bool = False, symbolic: bool = False
) -> torch.export.ExportedProgram:
    """length: dynamic length;  dynamic: counts are nodes;  symbolic: counts are symbols even where they are known."""
    model = zoo.draw(Toy(layers, weighted)).eval()
    dims = {0: torch.export.Dim("batch", min=1, max=64)}
    if length:
        dims[1] = torch.export.Dim("sequence", min=12, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (tokens(2),), dynamic_shapes=(dims,))
    if not dynamic:
        return program
    with symbolic_counts() if symbolic else nullcontext():
        return rebuild(program, retrace(program, Recount(program.graph_module).run))


def tokens(batch: int, length: int = 12, channels: int = 8) -> torch.Tensor:
    return torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(batch * 100 + length))


@pytest.fixture(params=["static", "dynamic length"])
def program(request: pytest.FixtureRequest) -> torch.export.ExportedProgram:
    return export_toy(length=request.param == "dynamic length")


@pytest.fixture
def make_program() -> Any:
    return export_toy


@pytest.fixture
def make_tokens() -> Any:
    return tokens
