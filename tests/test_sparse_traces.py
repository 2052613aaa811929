"""Sparse attention methods as compilers see them: no size or branch that hangs on data, and the same in ONNX files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from decoders import captured, prompt
from sparse_oracle import drawn
from sparse_registry import SMALL, every_index, every_method, small
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

import tamis

OF_DATA = {"_local_scalar_dense", "item", "nonzero", "unique", "unique_dim", "masked_select", "is_nonzero", "equal"}
QUICK = ("block-sparse", "hip", "routing", "vertical-slash")  # tracing takes a second or more


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in SMALL])
def test_nothing_waits_for_data(name: str) -> None:
    """T16: traced at symbolic sizes, no node fetches a number and no size comes from one."""
    heads, method = drawn(20, 70, lengths=[70, 33]), small(name)

    def run(queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        return method.attend(replace(heads, queries=queries, keys=keys, values=values, lengths=lengths))

    given = heads.queries, heads.keys, heads.values, heads.lengths
    graph = make_fx(run, tracing_mode="symbolic", pre_dispatch=True)(*given).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called
    assert not [target for target in called if OF_DATA & {*target.split(".")}]
    tensors = [x for n in graph.nodes for x in pytree.tree_leaves(n.meta.get("val")) if isinstance(x, Tensor)]
    assert not any(free_unbacked_symbols(x) for x in tensors)


@pytest.mark.gpu
@every_index
def test_an_index_is_made_within_a_cuda_graph(name: str) -> None:
    """T16: nothing synchronises, and a replay answers to new inputs."""
    parts = ("queries", "keys", "values")
    heads, other, method = drawn(21, 512, size=64), drawn(22, 512, size=64), small(name)
    heads, other = (replace(h, **{part: getattr(h, part).cuda() for part in parts}) for h in (heads, other))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        method.index(heads)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = method.index(heads)
    for part in parts:
        getattr(heads, part).copy_(getattr(other, part))
    graph.replay()
    expected = method.index(other)
    for one in ("tiles", "columns", "permutation"):
        if getattr(made, one) is not None:
            assert torch.equal(getattr(made, one), getattr(expected, one))


@pytest.mark.full
@every_method
def test_an_onnx_file_of_every_method_is_what_torch_computes(name: str, tmp_path: Any) -> None:
    """T15: `export` runs the file in ONNX Runtime at other sizes and compares; nothing is kept where it differs."""
    _, graph = captured("llama")
    inputs = prompt(2, 40, "left")
    fast = tamis.compile(graph.program, kwargs=inputs, passes=[small(name)], verify=False)
    assert fast.export(tmp_path / "sparse.onnx")
