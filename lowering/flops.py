"""`count_flops`: floating point operations of a program, per node, without computing anything.

A multiplication and an addition count as two.  Matrix products, convolutions, attention and tamis ops count;
element-wise work, norms and softmax do not, as is usual for published figures (which count a
multiply-add once: halve the total).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Flops:
    """What a program computes at one set of input shapes.

    total     floating point operations
    by_node   those of each node, by name; nodes that count nothing are left out
    tokens    what each token_count node answered, by name
    uncounted ops of other libraries (not torch's own) without a formula, which count nothing
    """

    total: int
    by_node: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()


def count_flops(program: ExportedProgram, inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None) -> Flops:
    """Count at the shapes of `inputs`, (args, kwargs) as the program is called; default: its example inputs."""
    args, kwargs = inputs or program.example_inputs
    given = iter(pytree.tree_leaves((args, kwargs)))
    user_inputs = set(program.graph_signature.user_inputs)
    counter = _Counter(program.graph_module)
    # without autograd attention goes straight to the kernels that have formulas; sizes that depend on data are symbols
    with torch.no_grad(), FakeTensorMode(shape_env=ShapeEnv()) as mode:
        values = [
            _fake(next(given) if node.name in user_inputs else node.meta["val"], mode)
            for node in program.graph.nodes
            if node.op == "placeholder"
        ]
        with counter.mode:
            counter.run(*values)
    return Flops(sum(counter.by_node.values()), counter.by_node, counter.tokens, tuple(sorted(counter.uncounted)))


class _Counter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.mode = FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention_flops})
        self.by_node: dict[str, int] = {}
        self.tokens: dict[str, int] = {}
        self.uncounted: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        before = self.mode.get_total_flops()
        result = super().run_node(n)
        made = self.mode.get_total_flops() - before
        if made:
            self.by_node[n.name] = made
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload):
            self._note(n.name, n.target, made, result)
        return result

    def _note(self, name: str, op: torch._ops.OpOverload, made: int, result: Any) -> None:
        if op.name() == "tamis::token_count":
            self.tokens[name] = int(result)
        elif op.namespace != "aten" and op.overloadpacket not in self.mode.flop_registry:
            self.uncounted.add(op.name())


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    """A fake tensor of the same shape; sizes that are symbols elsewhere are those of the inputs here."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty(tuple(map(int, value.shape)), dtype=value.dtype, device=value.device)


_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch 2.11 has no formula for it


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Q K^T and P V: 2 * B * H * N * M * (D + Dv)."""
    batch, heads, rows, width = query
    return int(2 * batch * heads * rows * key[2] * (width + value[3]))
