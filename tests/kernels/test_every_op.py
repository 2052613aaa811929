"""What holds for every op on every one of its samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import one_of_each_kind
from onnx_call import run_call
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.kernels.symbols import backed_symbol, generic_examples
from tamis.op import OPS

CASES = [pytest.param(op, args, id=f"{name}-{i}") for name, op in OPS.items() for i, args in enumerate(op.samples())]
every_sample = pytest.mark.parametrize(("op", "args"), CASES)


def results(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value]


def assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert torch.equal(got, expected) or torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
    else:
        assert got == expected


@every_sample
def test_opcheck(op, args):
    torch.library.opcheck(op.call, args, test_utils=("test_schema", "test_faketensor"))


@every_sample
def test_the_registered_op_is_the_reference(op, args):
    for got, expected in zip(results(op.call(*args)), results(op.reference(*args)), strict=True):
        if op.on_cpu is None:
            assert_same(got, expected)
        else:  # the same sums in another order
            limit = {"rtol": 2e-3, "atol": 2e-3} if got.dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-6}
            assert got.stride() == expected.stride()
            torch.testing.assert_close(got, expected, **limit)


@every_sample
def test_onnx_runtime_equals_the_reference(op, args):
    if op.onnx is None and op.parts is None:  # lowering for a GPU alone makes it
        return
    expected = [torch.as_tensor(x) for x in results(op.reference(*args))]
    if op.onnx is None:  # its parts are ops that have a form in ONNX
        for one, other in zip(results(op.parts(*args)), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        return
    assert_close(run_call(op.onnx(*args), expected), expected)


@pytest.mark.parametrize(("op", "args"), [case for case in CASES if case.values[0].contrib is not None])
def test_operators_of_onnx_runtime_equal_the_reference(op, args):
    call = op.contrib(*args)
    if not isinstance(call, str):
        expected = results(op.reference(*args))
        assert_close(run_call(call, expected), expected)


def assert_close(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        if b.is_floating_point() and b.dtype != torch.float16:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        elif b.is_floating_point():
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)  # two units in the last place
        else:
            assert_same(a, b)


@pytest.mark.parametrize(("op", "args"), one_of_each_kind(CASES))
def test_the_reference_traces_with_symbolic_shapes(op, args):
    traced, expected_shapes, inputs = trace(op, args)
    assert not [node for node in traced.graph.nodes if node.op == "get_attr"]
    assert all(node.op != "call_function" or "tamis" not in str(node.target) for node in traced.graph.nodes)
    values = traced.graph.output_node().args[0]
    values = values if isinstance(values, list | tuple) else [values]
    if op.name != "token_count":
        # exactly the shapes of the rule: another expression for the same length would be compared, and would spread
        assert [str(tuple(value.meta["val"].shape)) for value in values][:2] == expected_shapes[:2]
    for got, expected in zip(results(traced(*inputs)), results(op.reference(*args)), strict=True):
        assert_same(got, expected)


def trace(op: Any, args: tuple[Any, ...]) -> tuple[Any, list[str], list[Any]]:
    """The reference as a graph of ATen nodes over fake tensors with symbolic shapes, and what the fake says of them."""
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env)
    counts = [i for i, arg in enumerate(op.call._schema.arguments) if "SymInt" in str(arg.real_type)]
    flat, spec = pytree.tree_flatten(args, is_leaf=lambda one: one is None)
    place_of = [i for i, arg in enumerate(args) for _ in pytree.tree_leaves(arg, is_leaf=lambda one: one is None)]
    live = [i for i, arg in enumerate(flat) if isinstance(arg, torch.Tensor) or place_of[i] in counts]

    def symbolic(leaf: int) -> Any:
        value, index = flat[leaf], place_of[leaf]
        if index in counts:
            return backed_symbol(shape_env, value)
        # equal sizes share a symbol, as they do in a model; heads and features are known
        sizes = [DimDynamic.DUCK] * value.dim()
        if value.shape == flat[0].shape[-1:] and flat[0].is_floating_point():
            sizes = [DimDynamic.STATIC]
        if value.is_floating_point() and value.dim() > 2:
            name = op.call._schema.arguments[index].name
            for axis in {"mask": (-3,), "lse": (1,), "attention": (1,), "summary_bias": (1,)}.get(
                name, (1, 3) if value.dim() == 4 else (2,)
            ):
                sizes[axis] = DimDynamic.STATIC
        return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    def call(function: Any, values: Any) -> Any:
        given = dict(zip(live, values, strict=True))
        return function(*pytree.tree_unflatten([given.get(i, arg) for i, arg in enumerate(flat)], spec))

    with mode:
        mode, fakes = generic_examples([symbolic(i) for i in live])
    with mode, torch.no_grad():
        shapes = [str(tuple(getattr(x, "shape", ()))) for x in results(call(op.fake, fakes))]
        tracer = make_fx(lambda *values: call(op.reference, values), tracing_mode="real", pre_dispatch=True)
        traced = tracer(*fakes)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced, shapes, [flat[i] for i in live]


@every_sample
def test_batch_rows_do_not_depend_on_each_other(op, args):
    batch = next(arg.shape[0] for arg in args if isinstance(arg, torch.Tensor))
    if batch < 2 or op.name == "token_count":
        return
    rows = [arg[1:2] if isinstance(arg, torch.Tensor) and arg.shape[:1] == (batch,) else arg for arg in args]
    for got, expected in zip(results(op.reference(*rows)), results(op.reference(*args)), strict=True):
        if expected.is_floating_point():
            torch.testing.assert_close(got, expected[1:2], rtol=1e-6, atol=1e-6, equal_nan=True)
        else:
            assert torch.equal(got, expected[1:2])


@every_sample
def test_the_flop_counter_knows_the_op(op, args):
    with FlopCounterMode(display=False) as counter:
        op.call(*args)
    shapes = [arg.shape if isinstance(arg, torch.Tensor) else arg for arg in args]
    assert counter.get_total_flops() == op.flops(*shapes)


FLOATS = ["bipartite_match", "reduce_tokens", "attention_rows", "attention"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", FLOATS)
def test_other_precisions_compute_in_float32_or_better(name, dtype):
    """Against float64 on the same rounded inputs only the rounding of the result may show."""
    op = OPS[name]
    for args in op.samples():
        first = args[0]
        if first.dtype != torch.float32 or first.shape[0] == 0:
            continue
        features = 3 if name == "attention" else 2 if name == "attention_rows" else 1
        rounded = [arg.to(dtype) if i < features else arg for i, arg in enumerate(args)]
        exact = [arg.to(dtype).double() if i < features else arg for i, arg in enumerate(args)]
        for got, expected in zip(results(op.reference(*rounded)), results(op.reference(*exact)), strict=True):
            if not expected.is_floating_point():
                assert torch.equal(got, expected)
                continue
            assert got.dtype in (dtype, torch.float32)
            bound = 1e-5 if got.dtype in (torch.float32, torch.float64) else 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(got.double(), expected, rtol=bound, atol=bound, equal_nan=True)
