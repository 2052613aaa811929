"""What other people's exceptions and values say, as far as it fits into a line of ours."""

from __future__ import annotations

from typing import Any


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that is not empty; its class where there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def brief(value: Any) -> str:
    """A value as Python writes it where that is short, else what kind of thing it is: `a Tensor`, `a list of int`."""
    text = repr(value)
    if len(text) <= 60 and not any(mark in text for mark in ("\n", " at 0x", "tensor(", "array(")):
        return text
    if not isinstance(value, list | tuple):
        return kind_of(value)
    return f"{kind_of(value)} of {' and '.join(sorted({type(one).__name__ for one in value}))}"


def kind_of(value: Any) -> str:
    """The type of a value with its article: `a Tensor`, `an int`."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
