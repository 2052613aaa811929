"""Shape rules of a rewrite say what torch says: shapes, strides, types and refusals."""

from __future__ import annotations

import pytest
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import gelu

from tamis.passes.quick_shapes import RULES, quick_shapes

aten = torch.ops.aten


def fakes(mode, *tensors):
    """Fake tensors with a symbol for every axis of size 3 or 5."""
    converted = []
    for x in tensors:
        if isinstance(x, torch.Tensor):
            for axis, size in enumerate(x.shape):
                if size in (3, 5):
                    torch._dynamo.maybe_mark_dynamic(x, axis)
            x = mode.from_tensor(x)
        converted.append(x)
    return converted


def described(results):
    results = results if isinstance(results, tuple) else (results,)
    return [(tuple(map(int, x.shape)), tuple(map(int, x.stride())), x.dtype, x.device) for x in results]


def answer(function, *args):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with torch.no_grad(), enable_python_dispatcher(), mode:
        return described(function(*fakes(mode, *args)))


def linear(x, weight, bias):
    return torch.nn.functional.linear(x, weight, bias)


def layer_norm(x, weight, bias):
    return torch.nn.functional.layer_norm(x, (8,), weight, bias)


X = torch.zeros(3, 5, 8)
CASES = {
    "linear": (linear, X, torch.zeros(7, 8), torch.zeros(7)),
    "linear without bias": (linear, X, torch.zeros(7, 8), None),
    "linear of a matrix": (linear, X[0], torch.zeros(7, 8), torch.zeros(7)),
    "linear of strides": (linear, torch.zeros(5, 3, 8).transpose(0, 1), torch.zeros(7, 8), torch.zeros(7)),
    "linear in half": (linear, X.half(), torch.zeros(7, 8).half(), torch.zeros(7).half()),
    "mm": (torch.mm, X[0], torch.zeros(7, 8).T),
    "addmm": (torch.addmm, torch.zeros(7), X[0], torch.zeros(8, 7)),
    "addmm of a matrix": (torch.addmm, torch.zeros(5, 1), X[0], torch.zeros(8, 7)),
    "layer norm": (layer_norm, X, torch.zeros(8), torch.zeros(8)),
    "layer norm of strides": (layer_norm, torch.zeros(5, 3, 8).transpose(0, 1), torch.zeros(8), torch.zeros(8)),
    "layer norm alone": (layer_norm, X, None, None),
    "layer norm in half": (layer_norm, X.bfloat16(), torch.zeros(8).bfloat16(), torch.zeros(8).bfloat16()),
    "moments": (lambda x: aten.native_layer_norm(x, [5, 8], None, None, 1e-5), X.double()),
    "gelu": (gelu, X),
    "gelu of strides": (gelu, X.transpose(0, 1)),
    "gelu by tanh in half": (lambda x: gelu(x, approximate="tanh"), X.half()),
    "view of heads": (lambda x: x.view(3, 5, 2, 4), X),
    "view of rows": (lambda x: x.view(15, 8), X),
    "view with a size left out": (lambda x: x.view(-1, 8), X),
    "view of a part": (lambda x: x[1].view(5, 2, 4), X),
    "view with axes of size 1": (lambda x: x.view(1, 3, 5, 1, 8), X),
    "view of the same sizes": (lambda x: x.view(3, 5, 8), X),
    "view of all": (lambda x: x.view(120), X),
    "view of strides": (lambda x: x.view(5, 3, 2, 4), torch.zeros(3, 5, 8).transpose(0, 1)),
    "view of a part of each row": (lambda x: x[..., :4].view(15, 4), torch.zeros(3, 5, 8)),
    "view of nothing": (lambda x: x[:0].view(0, 4, 2), X),
    "view of a number": (lambda x: x.view(1, 1), torch.tensor(1.0)),
    "view as a number": (lambda x: x.view(()), torch.zeros(1, 1)),
    "reshape of strides": (lambda x: x.reshape(5, 24), X.transpose(0, 1)),
    "place in its storage": (lambda x: torch.tensor(x[2].view(40).storage_offset()), X),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_eager_torch(name):
    function, *args = CASES[name]
    with quick_shapes():
        got = answer(function, *args)
    assert got == described(function(*args))


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (linear, (X, torch.zeros(7, 9), None)),
        (linear, (X, torch.zeros(7, 8), torch.zeros(6))),
        (linear, (X, torch.zeros(7, 8).double(), None)),
        (torch.addmm, (torch.zeros(6), X[0], torch.zeros(8, 7))),
        (torch.mm, (X, torch.zeros(8, 7))),
        (layer_norm, (X[..., :7], torch.zeros(8), torch.zeros(8))),
        (layer_norm, (X, torch.zeros(7), None)),
        (lambda x: x.view(3, 5, 7), (X,)),
        (lambda x: x.view(7, 5, -1), (X,)),
        (lambda x: x.view(15, 8), (X.transpose(0, 1),)),
        (gelu, (X.long(),)),
    ],
)
def test_what_torch_refuses_is_refused(function, args):
    with pytest.raises(RuntimeError):
        function(*args)
    with quick_shapes(), pytest.raises((RuntimeError, ValueError)):  # the second is torch's own for a view of strides
        answer(function, *args)


def test_the_rules_are_in_use_inside_and_gone_after():
    before = dict(fake_impls.get_fast_op_impls())
    with quick_shapes():
        assert fake_impls.get_fast_op_impls().keys() == before.keys() | RULES.keys()
        with quick_shapes():  # a rewrite inside another
            pass
        assert fake_impls.get_fast_op_impls().keys() == before.keys() | RULES.keys()
    assert fake_impls.get_fast_op_impls() == before
