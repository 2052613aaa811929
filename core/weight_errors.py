"""Errors about the trained tensors of a method; the rules of `errors` hold."""

from __future__ import annotations

from .errors import TamisError


class WeightsUnreadable(TamisError):
    """The tensors of a method are not where they should be, or not in a form that is safe to read."""

    template = (
        "{where}: weights={path}: {reason}.\n"
        "  hint: weights is the path of a .safetensors file, or in Python a dict of tensors."
    )
    exit_code = 2


class WeightsMismatch(TamisError):
    """A method was given other tensors than it needs in this model."""

    template = (
        "{where}: the tensors in {path} do not fit: {reason}.\n"
        "  hint: it needs {expected} for a model of {width} channels with layers {layers}."
    )
    exit_code = 2


class WeightsChanged(TamisError):
    """A recipe is replayed with other tensors than its own."""

    template = (
        "{path}: the recipe was made with other weights: the hash of {file} was {expected} and is {got}.\n"
        "  hint: put the file back, or name the passes anew (--pass ...; in Python: passes=...)."
    )
    exit_code = 2
