"""What example inputs must be, checked before `torch.export` runs the model on them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.export import AdditionalInputs, ShapesCollection
from torch.utils import _pytree as pytree

from ..error_text import brief, first_line
from ..errors import BadParameter, CaptureFailed, InputMismatch
from .dims import Axes, find_axes

GIVEN = (Mapping, list, tuple, Axes, ShapesCollection, AdditionalInputs, type(None))
SHAPES = '"auto" finds them; else as torch.export.export takes them: {input: {dimension: torch.export.Dim("batch")}}.'


def check_shapes(shapes: Any) -> None:
    """Raise BadParameter for what can be no dynamic shapes."""
    if shapes != "auto" if isinstance(shapes, str) else not isinstance(shapes, GIVEN):
        rule = '"auto" or shapes of torch.export'
        raise BadParameter(where="compile", name="dynamic_shapes", rule=rule, got=brief(shapes), hint=SHAPES)


def check_fixed(shapes: Any) -> None:
    """Raise BadParameter for shapes given with a program, which has those it was exported with."""
    check_shapes(shapes)
    if shapes != "auto":
        rule, hint = "left out with an exported program", "it has the dynamic dimensions it was exported with."
        raise BadParameter(where="compile", name="dynamic_shapes", rule=rule, got=brief(shapes), hint=hint)


def check_example(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> None:
    """Raise InputMismatch for inputs that `forward` does not have, and where none is a tensor, or one is empty.

    Raises CaptureFailed for a `forward` that Python cannot look into, as of a traced module.
    """
    try:
        signature = inspect.signature(model.forward)
    except ValueError as error:
        hint = "give the module itself, not what torch.jit made of it."
        raise CaptureFailed(model=name, reason=first_line(error), where="", hint=hint) from error
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        takes = ", ".join(signature.parameters)
        got = ", ".join([*(f"args[{i}]" for i in range(len(args))), *kwargs])
        rule = f"example inputs must be those of forward({takes})"
        raise InputMismatch(where=name, rule=rule, got=got, hint=f"forward says: {error}.") from error
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    if leaves and not any(isinstance(leaf, Tensor) for leaf in leaves):
        got = ", ".join(map(brief, (*args, *kwargs.values())))
        hint = "convert arrays with torch.from_numpy; a tokenizer gives tensors with return_tensors='pt'."
        raise InputMismatch(where=name, rule="example inputs must be tensors", got=got, hint=hint)
    for leaf, axes in zip(leaves, find_axes(args, kwargs).leaves, strict=True):
        if empty := next((found for axis, found in axes.items() if leaf.shape[axis] == 0), None):
            rule, hint = f"example inputs must have a {empty} of 1 or more", "any rows and tokens will do."
            raise InputMismatch(where=name, rule=rule, got=list(leaf.shape), hint=hint)
