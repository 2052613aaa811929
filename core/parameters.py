"""The parameters of a pass: what they may hold, how they are written, and what was meant by one that is not there."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

from .error_text import brief
from .errors import BadParameter
from .schedule import Schedule

SPELLINGS = {  # what other tools call the fraction, and whether they mean the part that is removed
    "ratio": True,
    "compression_ratio": True,
    "pruning_rate": True,
    "pruning_ratio": True,
    "prune_ratio": True,
    "merge_ratio": True,
    "keep_rate": False,
    "retention_ratio": False,
    "keep": False,
}
LARGEST = 2**31 - 1  # two of them may be multiplied in 64 bits, as formulas of counts do
KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number"}  # by a default's type
OPTIONAL = {f"{kind.__name__} | None": kind for kind in KINDS}  # by its annotation, where the default is None


def check_kinds(one: Any) -> None:
    """Refuse what a pass does not take: where a default is a bool or an int, all but these; where it is a float, NaN.

    Where it is None, the annotation says which of them may be given instead, if any.

    Raises:
        BadParameter: another kind of value was given.
    """
    for f in dataclasses.fields(one):
        value, kind = getattr(one, f.name), type(f.default)
        if f.default is None and value is not None:
            kind = OPTIONAL.get(str(f.type), kind)
        holds = type(value) is kind
        if kind is float:
            holds = isinstance(value, int | float) and not isinstance(value, bool) and value == value
        if kind in KINDS and not holds:
            hint = f"its default is {str(f.default).lower()}."
            raise BadParameter(where=one.name, name=f.name, rule=KINDS[kind], got=repr(value), hint=hint)


def check_sizes(one: Any) -> None:
    """Refuse whole numbers whose arithmetic would leave 64 bits, wherever they stand in a parameter of a pass.

    Raises:
        BadParameter: there is one.
    """
    for f in dataclasses.fields(one):
        for number in integers(getattr(one, f.name)):
            if abs(number) > LARGEST:
                rule, hint = f"between -{LARGEST} and {LARGEST}", "larger numbers of anything do not fit a tensor."
                raise BadParameter(where=one.name, name=f.name, rule=rule, got=number, hint=hint)


def check_whole(where: str, least: int, **values: Any) -> None:
    """Refuse arguments of a call, by name, that are no whole numbers of `least` or more.

    Raises:
        BadParameter: there is one.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            rule = f"a whole number, {least} or more"
            raise BadParameter(where=where, name=name, rule=rule, got=brief(value), hint=f"see help(tamis.{where}).")


def check_flags(where: str, **values: Any) -> None:
    """Refuse arguments of a call, by name, that are neither True nor False.

    Raises:
        BadParameter: there is one.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            rule, hint = KINDS[bool], f"see help(tamis.{where})."
            raise BadParameter(where=where, name=name, rule=rule, got=brief(value), hint=hint)


def path_text(where: str, path: Any) -> str:
    """A path as text.

    Raises:
        BadParameter: it is none.
    """
    if not isinstance(path, str | os.PathLike):
        hint = f"see help(tamis.{where})."
        raise BadParameter(where=where, name="path", rule="text or a Path", got=brief(path), hint=hint)
    return str(os.fspath(path))


def keywords(where: str, given: Any) -> dict[str, Any]:
    """Inputs by name; nothing for None.

    Raises:
        BadParameter: it is no mapping from names.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        rule, hint = "a mapping from the names of inputs", 'write {"input_ids": ids}; without names they are args.'
        raise BadParameter(where=where, name="kwargs", rule=rule, got=brief(given), hint=hint)
    return dict(given)


def integers(value: Any) -> Iterator[int]:
    """The whole numbers in a parameter, those of a schedule and of nested lists too."""
    if isinstance(value, Schedule):
        value = value.values
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        for one in value:
            yield from integers(one)
    elif isinstance(value, int):
        yield value


def explained(cls: type) -> dict[str, str]:
    """What the docstrings of a pass class and its bases say of its parameters, each in one line.

    It is read from their sections `Args:`: entries are `name: text` or `one, two: text`, and deeper lines go on.
    """
    found: dict[str, str] = {}
    for one in cls.__mro__:
        doc = inspect.cleandoc(one.__dict__.get("__doc__") or "")
        section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", doc, re.MULTILINE)
        entries = re.split(r"^ {4}(?=\w)", section.group(1) if section else "", flags=re.MULTILINE)
        for entry in filter(None, entries):
            names, _, text = entry.partition(":")
            for name in names.split(","):
                found.setdefault(name.strip(), " ".join(text.split()))
    return found


def shown(value: Any) -> str:
    """A value as the text form of passes writes it."""
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "none"}[value]
    value = list(value) if isinstance(value, tuple) else value
    return str(value).replace(" ", "") if isinstance(value, list | dict) else str(value)


def advice(parameter: str, value: Any, known: list[str]) -> dict[str, str]:
    """What may be meant by a parameter that a pass does not know, as fields of UnknownParameter."""
    if parameter in SPELLINGS and "keep_ratio" in known:
        kept = round(1 - value, 6) if SPELLINGS[parameter] and isinstance(value, int | float) else value
        return {
            "nearest": ".",
            "hint": f"write keep_ratio={kept}; keep_ratio is the fraction kept, everywhere in tamis.",
        }
    near = difflib.get_close_matches(parameter, known, n=1)
    return {"nearest": f"; did you mean {near[0]}?" if near else ".", "hint": f"it takes {', '.join(known)}."}
