"""What a GPU has to do for a graph, counted without one: launches, and bytes that kernels of ours move.

Products, convolutions and attention of torch are one launch each.  An op of ours makes the launches that its twin says.
What is left is point-wise work and reductions.  A node of it that reads another is in one launch with it, as a compiler
that fuses would have it, unless a value on the way to it comes out of a later kernel.  A reshape that has to copy is
such work; other views are nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tamis.capture.program import copied, rebuild
from tamis.kernels.triton import twin_of
from tamis.kernels.triton.architecture import Architecture
from tamis.kernels.triton.launch import Launch
from tamis.lowering.fusion import fuse
from tamis.lowering.splice import Splicer, fake_mode_of, op_of

aten = torch.ops.aten
EXTERN = {aten.linear.default, aten.conv2d.default, aten.matmul.default, aten.scaled_dot_product_attention.default}


@dataclass
class Work:
    """Of one run.

    twins       launches of our kernels by the node that makes them;  moved  bytes that they read and write, likewise
    extern      launches of torch's own kernels
    pointwise   nodes of point-wise work and reductions, by op;  groups  launches that these need
    """

    twins: dict[str, list[Launch]] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    extern: int = 0
    pointwise: Counter[str] = field(default_factory=Counter)
    groups: int = 0

    @property
    def launches(self) -> int:
        return self.extern + self.groups + sum(map(len, self.twins.values()))


def on_gpu(program: ExportedProgram) -> ExportedProgram:
    """The program with chains fused and ops that have no kernel inlined, as lowering for a GPU has it."""
    module = copied(program)
    fuse(module.graph)
    splicer = Splicer(fake_mode_of(module.graph))
    for node in list(module.graph.nodes):
        op = op_of(node)
        if op is not None and op.name != "token_count" and twin_of(op) is None:
            splicer.splice(node, op.reference)
    module.recompile()
    return rebuild(program, module)


def count_work(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Work:
    """At the shapes of the given inputs (meta tensors will do), on an H100 or H200."""
    given = iter(pytree.tree_leaves((args, kwargs)))
    users = set(program.graph_signature.user_inputs)
    counter = _Counter(program.graph_module)
    with torch.no_grad(), FakeTensorMode():
        counter.run(
            *(
                _fake(next(given) if node.name in users else node.meta["val"])
                for node in program.graph.nodes
                if node.op == "placeholder"
            )
        )
    counter.work.groups = len({counter.group_of(node) for node in counter.groups})
    return counter.work


def _fake(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


class _Counter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.work = Work()
        self.groups: dict[fx.Node, fx.Node] = {}  # a node of point-wise work -> another of its group
        self.behind: dict[fx.Node, set[fx.Node]] = {}  # the point-wise nodes that a value shows, through views
        self.depth: dict[fx.Node, int] = {}  # kernels, point-wise ones apart, on the longest way to a value

    def run_node(self, node: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        result = super().run_node(node)
        self.behind[node] = set()
        self.depth[node] = max((self.depth[one] for one in node.all_input_nodes), default=0)
        if node.op != "call_function":
            return result
        shown = set().union(*(self.behind[one] for one in node.all_input_nodes))
        op = op_of(node)
        if op is not None and op.name != "token_count":
            self._launch(node, args, kwargs)
            self.depth[node] += 1
        elif node.target in EXTERN:
            self.work.extern += 1
            self.depth[node] += 1
        elif _is_view(result, (args, kwargs)):
            self.behind[node] = shown
        else:
            self._join(node, shown)
        return result

    def _launch(self, node: fx.Node, args: Any, kwargs: Any) -> None:
        op = op_of(node)
        twin = twin_of(op) if op else None
        schema: Any = op.call._schema.arguments if op else ()
        given = [*args, *(kwargs.get(one.name, one.default_value) for one in schema[len(args) :])]
        assert twin is not None, f"{node.name} has no kernel"
        assert not twin.why_not(*given), f"{node.name}: {twin.why_not(*given)}"
        launches, results = twin.work(Architecture.named("sm_90"), *given)
        self.work.twins[node.name] = launches
        known = [*pytree.tree_leaves(given), *pytree.tree_leaves(results)]
        self.work.moved[node.name] = sum(_bytes(launch, known) for launch in launches)

    def _join(self, node: fx.Node, shown: set[fx.Node]) -> None:
        self.work.pointwise[str(node.target)] += 1
        self.groups[node] = node
        self.behind[node] = {node}
        for one in shown:
            if self.depth[one] == self.depth[node]:
                self.groups[self.group_of(one)] = node

    def group_of(self, node: fx.Node) -> fx.Node:
        while self.groups[node] is not node:
            node = self.groups[node]
        return node


def _is_view(result: Any, given: Any) -> bool:
    """Whether no byte is moved: sizes, and tensors in memory that an argument has."""
    tensors = [one for one in pytree.tree_leaves(result) if isinstance(one, Tensor)]
    memory = {_memory(one) for one in pytree.tree_leaves(given) if isinstance(one, Tensor)}
    return all(_memory(one) in memory for one in tensors)


def _memory(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _bytes(launch: Launch, known: list[Any]) -> int:
    """Of every tensor once, of one that the kernels make for themselves twice: it is written and read."""
    named = {_memory(one) for one in known if isinstance(one, Tensor)}
    tensors = {_memory(one): one for one in launch.arguments.values() if isinstance(one, Tensor)}
    return sum(_extent(one) * (1 if place in named else 2) for place, one in tensors.items())


def _extent(value: Tensor) -> int:
    sizes = [size for size, stride in zip(value.shape, value.stride(), strict=True) if stride]
    return torch.Size(sizes).numel() * value.element_size()
