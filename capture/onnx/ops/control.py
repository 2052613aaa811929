"""Constants, branches, loops and sequences; branches and loops are resolved while the model is captured."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..known import Known
from ..table import Body, NotKnown, Number, Unsupported, Value, from_start, op, tensor


@op("Constant")
def constant(
    *,
    value: Value = None,
    value_float: float | None = None,
    value_floats: list[float] | None = None,
    value_int: int | None = None,
    value_ints: list[int] | None = None,
) -> Value:
    """A value that stands in the file."""
    if value is not None:
        return value
    if value_float is not None or value_floats is not None:
        return Known.of(np.array(value_float if value_floats is None else value_floats, np.float32))
    if value_int is not None or value_ints is not None:
        return Known.of(np.array(value_int if value_ints is None else value_ints, np.int64))
    raise Unsupported("it is a sparse tensor or text")


@op("If")
def if_(condition: Number, *, then_branch: Body, else_branch: Body) -> Any:
    """One of two graphs; which one must be known."""
    return tuple(then_branch() if condition else else_branch())


MOST = 512  # runs of a loop


@op("Loop")
def loop(trips: Number | None, condition: Number | None, *carried: Value, body: Body, outputs: int) -> Any:
    """A graph run a known number of times; values are handed on, and what each run adds is stacked."""
    values = list(carried)
    stacks: list[list[Tensor]] = [[] for _ in range(outputs - len(values))]
    going = True if condition is None else bool(condition)
    step = 0
    while going and (trips is None or step < trips):
        if step == MOST:
            raise Unsupported(f"it runs more than {MOST} times, and every run is written out")
        counter = Known.of(np.array(step, np.int64))
        going_on, *results = body(counter, Known.of(np.array(True)), *values)
        if not isinstance(going_on, Known):
            raise NotKnown("the condition to go on")
        going = bool(going_on.number())
        values = results[: len(values)]
        for stack, one in zip(stacks, results[len(values) :], strict=True):
            stack.append(tensor(one))
        step += 1
    if stacks and not step:
        raise Unsupported("it stacks the results of no runs")
    return (*values, *(torch.stack(stack) for stack in stacks))


@op("Scan", since=9)
def scan(
    *values: Value,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: list[int] | None = None,
    scan_input_directions: list[int] | None = None,
    scan_output_axes: list[int] | None = None,
    scan_output_directions: list[int] | None = None,
    outputs: int,
) -> Any:
    """A graph run for every slice of some inputs; states are handed on, and what each run adds is stacked."""
    count = len(values) - num_scan_inputs
    states, scanned = list(values[:count]), [tensor(x) for x in values[count:]]
    axes = scan_input_axes or [0] * num_scan_inputs
    backwards = scan_input_directions or [0] * num_scan_inputs
    slices = [
        list(x.unbind(axis))[:: -1 if back else 1] for x, axis, back in zip(scanned, axes, backwards, strict=True)
    ]
    stacks: list[list[Tensor]] = [[] for _ in range(outputs - count)]
    for parts in zip(*slices, strict=True):
        results = body(*states, *parts)
        states = results[:count]
        for stack, one in zip(stacks, results[count:], strict=True):
            stack.append(tensor(one))
    out_axes = scan_output_axes or [0] * len(stacks)
    reverse = scan_output_directions or [0] * len(stacks)
    stacked = [
        torch.stack(stack[:: -1 if back else 1], axis)
        for stack, axis, back in zip(stacks, out_axes, reverse, strict=True)
    ]
    return (*states, *stacked)


@op("SequenceConstruct", since=11)
def sequence_construct(*xs: Value) -> Any:
    """A list of tensors."""
    return list(xs)


@op("SequenceEmpty", since=11)
def sequence_empty(*, dtype: int = 1) -> Any:
    """A list of none."""
    return []


@op("SequenceInsert", since=11)
def sequence_insert(xs: Value, x: Value, place: Number | None = None) -> Any:
    """A list with one more, at a place or at its end."""
    place = len(xs) if place is None else place + len(xs) * (place < 0)
    return [*xs[:place], x, *xs[place:]]


@op("SequenceErase", since=11)
def sequence_erase(xs: Value, place: Number = -1) -> Any:
    """A list without one."""
    place = from_start(place, len(xs))
    return [*xs[:place], *xs[place + 1 :]]


@op("SequenceAt", since=11)
def sequence_at(xs: Value, place: Number) -> Value:
    """One of a list."""
    return xs[place]


@op("SequenceLength", since=11)
def sequence_length(xs: Value) -> Known:
    """How many are in a list."""
    return Known.of(np.array(len(xs), np.int64))


@op("SplitToSequence", since=11)
def split_to_sequence(x: Tensor, split: Known | None = None, *, axis: int = 0, keepdims: int = 1) -> Any:
    """A tensor cut along an axis: into single slices, pieces of one size, or of given sizes."""
    if split is None:
        return list(x.unbind(axis) if not keepdims else torch.split(x, 1, axis))
    return list(torch.split(x, split.numbers() if split.data.ndim else split.number(), axis))


@op("ConcatFromSequence", since=11)
def concat_from_sequence(xs: Value, *, axis: int, new_axis: int = 0) -> Tensor:
    """A list of tensors joined along an axis, or stacked along a new one."""
    tensors = [tensor(x) for x in xs]
    return torch.stack(tensors, axis) if new_axis else torch.cat(tensors, axis)


@op("Optional", since=15)
def optional(x: Value = None, *, type: Any = None) -> Value:
    """A value that may be missing."""
    return x


@op("OptionalGetElement", since=15)
def optional_get_element(x: Value) -> Value:
    """The value, which must be there."""
    if x is None:
        raise Unsupported("its input is missing")
    return x


@op("OptionalHasElement", since=15)
def optional_has_element(x: Value = None) -> Known:
    """Whether the value is there."""
    return Known.of(np.array(x is not None))
