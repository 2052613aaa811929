"""Every error class in core: its template can be filled, its fields read, and it survives a process boundary."""

from __future__ import annotations

import inspect
import pickle
import string
from typing import Any

import pytest

from tamis import (
    call_errors,
    drawing_errors,
    errors,
    onnx_errors,
    recipe_errors,
    sparse_errors,
    stream_errors,
    target_errors,
    weight_errors,
)
from tamis.errors import TamisError

MODULES = (
    call_errors,
    drawing_errors,
    errors,
    onnx_errors,
    recipe_errors,
    sparse_errors,
    stream_errors,
    target_errors,
    weight_errors,
)
CLASSES = [
    cls
    for module in MODULES
    for _, cls in inspect.getmembers(module, inspect.isclass)
    if issubclass(cls, TamisError) and cls is not TamisError and cls.__module__ == module.__name__
]


def placeholders(template: str) -> dict[str, Any]:
    """A value for every field: a number where the format asks for one, else a word that can be found again."""
    fields = [(name, spec) for _, name, spec, _ in string.Formatter().parse(template) if name]
    return {name: 0.125 if spec else f"<{name}>" for name, spec in fields}


def test_all_errors_are_found() -> None:
    assert len(CLASSES) >= 30


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_template(cls: type[TamisError]) -> None:
    fields = placeholders(cls.template)
    error = cls(**fields)
    assert fields, "a message without fields cannot say what was got"
    for name, value in fields.items():
        assert getattr(error, name) == value
        assert ("0.12" if isinstance(value, float) else value) in str(error)
    assert "{" not in str(error)
    assert "\n  hint: " in str(error), "it must say what the user can do"
    assert 1 <= cls.exit_code <= 5


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_pickle(cls: type[TamisError]) -> None:
    error = cls(**placeholders(cls.template))
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.fields) == (cls, str(error), error.fields)


def test_a_missing_field_is_refused() -> None:
    with pytest.raises(KeyError, match="path"):
        errors.UnknownModelFormat(accepted="an .onnx file")
