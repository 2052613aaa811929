"""Binding calls, other sizes, descriptions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim
from toys import toy_call, toy_graph

from tamis.errors import InputMismatch
from tamis.runtime.inputs import Inputs, describe, example_call, mask_of, other_sizes

POSITIONAL = Inputs(("x",), ("mask",))


def test_names_come_from_the_program() -> None:
    assert Inputs.of(toy_graph().program) == Inputs((), ("input_ids", "attention_mask"))


def test_nested_inputs_have_no_name_but_a_place() -> None:
    class Nested(nn.Module):
        def forward(
            self, pair: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor | None = None
        ) -> torch.Tensor:
            return pair["a"] + pair["b"] + x

    x = torch.ones(2, 3)
    program = torch.export.export(Nested(), ({"a": x, "b": x}, x), {"y": None}, strict=False)
    inputs = Inputs.of(program)
    assert inputs == Inputs((None, "x"), ("y",))
    assert inputs.bind(({"a": 1, "b": 2}, 3), {}) == (({"a": 1, "b": 2}, 3), {"y": None})


@pytest.mark.parametrize(
    ("args", "kwargs"), [((1, 2), {}), ((1,), {"mask": 2}), ((), {"mask": 2, "x": 1}), ((1, 2), {"other": None})]
)
def test_calls_are_bound_however_they_are_split(args: tuple[int, ...], kwargs: dict[str, int]) -> None:
    assert POSITIONAL.bind(args, kwargs) == ((1,), {"mask": 2})


def test_one_dict_is_spread() -> None:
    assert Inputs((), ("a", "b")).bind(({"a": 1, "b": 2},), {}) == ((), {"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (
            (1, 2, 3),
            {},
            "forward: the compiled model takes 2 inputs, got 3 positional arguments.\n  hint: its inputs are x, mask.",
        ),
        ((1,), {"x": 1}, "takes each input once, got 'x' twice"),
        ((1,), {"y": 1}, "has no such input, got an argument 'y'"),
    ],
)
def test_wrong_calls_are_refused(args: tuple[int, ...], kwargs: dict[str, int], text: str) -> None:
    with pytest.raises(InputMismatch) as caught:
        POSITIONAL.bind(args, kwargs)
    assert text in str(caught.value)


def test_example_call_prefers_what_was_given() -> None:
    program = toy_graph().program
    _, kwargs = toy_call(batch=1)
    given = example_call(program, (), kwargs)
    assert given is not None
    assert given[1]["input_ids"].shape == (1, 8)
    own = example_call(program)
    assert own is not None
    assert own[1]["input_ids"].shape == (2, 8)


def test_descriptions() -> None:
    assert describe(toy_graph().program, toy_call()) == {"input_ids": "i64[2, 8]", "attention_mask": "i64[2, 8]"}


def test_other_sizes_change_the_batch_then_the_length_too() -> None:
    shapes = [call[1]["input_ids"].shape for call in other_sizes(toy_graph().program, toy_call())]
    assert shapes == [(3, 8), (3, 6)]


def test_other_sizes_leave_no_row_without_a_token() -> None:
    args, kwargs = toy_call()
    kwargs["attention_mask"] = torch.tensor([[0] * 6 + [1] * 2, [0] * 7 + [1]])
    shorter = other_sizes(toy_graph().program, (args, kwargs))[-1]
    name, mask = mask_of(toy_graph().program, shorter) or ("", torch.zeros(1, 1))
    assert name == "attention_mask"
    assert mask.tolist() == [[0] * 4 + [1] * 2, [0] * 5 + [1], [0] * 4 + [1] * 2]


def test_other_sizes_of_a_static_program() -> None:
    program = torch.export.export(nn.Linear(3, 3), (torch.ones(2, 3),))
    assert other_sizes(program, ((torch.ones(2, 3),), {})) == []


def test_other_sizes_stay_in_range() -> None:
    program = torch.export.export(nn.Linear(3, 3), (torch.ones(4, 3),), dynamic_shapes=({0: Dim("batch", max=4)},))
    (call,) = other_sizes(program, ((torch.ones(4, 3),), {}))
    assert call[0][0].shape == (3, 3)
