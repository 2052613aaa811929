"""The table of operations: which torch function an ONNX operation is, from which opset version on.

A function takes the operation's inputs in their order and its attributes by name.  What a parameter gets depends on how
it is annotated: `Tensor` a tensor; `Ints`, `Number` and `Known` numbers that are known at capture, symbols among them;
`Value` whatever there is; `Body` a graph as something to call.  An attribute may bear the name of a parameter (`axes`
was an attribute before it was an input).  A parameter `outputs` gets the number of results asked for.  A tuple is
several results; a list is one, a sequence.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...op import CONTRIB as CONTRIB
from .known import Known

Value = Any  # Tensor, Known, a list of these, or None
Ints = list[Any]
Number = Any
Body = Callable[..., list[Value]]
BY_VALUE = ("Ints", "Number", "Known")


class NotKnown(Exception):
    """A number is needed that depends on data; the text says which."""


class Unsupported(Exception):
    """An operation is asked for something that its function does not do; the text says what."""


@dataclass(frozen=True)
class Entry:
    """One operation from one version of its domain on."""

    function: Callable[..., Any]
    since: int

    @functools.cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Parameters by name, in order."""
        return dict(inspect.signature(self.function).parameters)

    @functools.cached_property
    def positional(self) -> list[inspect.Parameter]:
        """Parameters that inputs are bound to."""
        return [p for p in self.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]

    def by_value(self, place: int) -> bool:
        """Whether the input at a place must be known at capture."""
        parameter = self._at(place)
        return parameter is not None and kind_of(parameter) in BY_VALUE

    def by_tensor(self, place: int) -> bool:
        """Whether the input at a place is taken as a tensor, were it a number or not."""
        parameter = self._at(place)
        return parameter is not None and kind_of(parameter) == "Tensor"

    def _at(self, place: int) -> inspect.Parameter | None:
        if place < len(self.positional):
            return self.positional[place]
        last = self.positional[-1] if self.positional else None
        return last if last is not None and last.kind is last.VAR_POSITIONAL else None

    def call(self, inputs: list[Value], attributes: dict[str, Any], outputs: int) -> Any:
        """Convert the inputs as the function wants them, and call it."""
        if len(inputs) > len(self.positional) and self._at(len(inputs)) is None:
            raise Unsupported(f"it has {len(inputs)} inputs where {len(self.positional)} are known")
        positional = [converted(value, self._at(i)) for i, value in enumerate(inputs)]
        keywords = dict(attributes)
        if "outputs" in self.parameters:
            keywords["outputs"] = outputs
        for name in keywords:
            if name not in self.parameters:
                raise Unsupported(f"it has an attribute {name!r}, which is not known")
        taken = [p.name for p in self.positional[: len(positional)] if p.kind is p.POSITIONAL_OR_KEYWORD]
        for name in set(taken) & set(keywords):  # an input left out, and an attribute in its place
            positional[taken.index(name)] = keywords.pop(name)
        return self.function(*positional, **keywords)


def kind_of(parameter: inspect.Parameter) -> str:
    """`Tensor` of `Tensor | None`."""
    return str(parameter.annotation).removesuffix(" | None")


def converted(value: Value, parameter: inspect.Parameter | None) -> Any:
    """A value as the parameter's annotation asks for it; raises NotKnown."""
    kind = kind_of(parameter) if parameter is not None else "Value"
    if value is None:
        if (
            parameter is not None
            and parameter.kind is not parameter.VAR_POSITIONAL
            and parameter.default is not parameter.empty
        ):
            return parameter.default
        return None
    if kind == "Tensor":
        return tensor(value)
    if kind in BY_VALUE:
        assert parameter is not None
        if not isinstance(value, Known):
            raise NotKnown(f"its input {parameter.name!r}")
        return value.numbers() if kind == "Ints" else value.number() if kind == "Number" else value
    return value


def tensor(value: Value) -> Tensor:
    """A tensor, or a known value as one."""
    if isinstance(value, Known):
        return value.tensor()
    if not isinstance(value, Tensor):
        raise Unsupported(f"a {type(value).__name__} where a tensor is expected")
    return value


def from_start(place: int, count: int) -> int:
    """A place among so many (an axis among a tensor's), counted from the start; raises IndexError if there is none."""
    if not -count <= place < count:
        raise IndexError(f"{place} is not among {count} axes or entries")
    return place % count


TABLE: dict[tuple[str, str], list[Entry]] = {}


def op(*names: str, since: int = 1, domain: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function into the table under these operations."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            entries = TABLE.setdefault((domain, name), [])
            entries.append(Entry(function, since))
            entries.sort(key=lambda entry: entry.since, reverse=True)
        return function

    return enter


def find(domain: str, name: str, version: int) -> Entry | None:
    """The function for an operation in a version of its domain; None when there is none."""
    fill()
    entries = TABLE.get(("" if domain == "ai.onnx" else domain, name), [])
    return next((entry for entry in entries if entry.since <= version), None)


@functools.cache
def fill() -> None:
    """Import all files of `ops`, which enter their functions."""
    from . import ops

    for module in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        importlib.import_module(module.name)


def scalar_or_tensor(value: Value, like: Tensor) -> Any:
    """A number, where a known value is one and has no more axes than `like`; else a tensor."""
    if isinstance(value, Known) and value.data.size == 1 and value.data.ndim <= like.ndim and value.dtype == like.dtype:
        return value.number()
    return tensor(value)
