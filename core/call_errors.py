"""Errors about what a finished model is called with; the rules of `errors` hold."""

from __future__ import annotations

from .errors import CorruptModel, InputMismatch


class PositionsExceeded(InputMismatch):
    """A sequence has tokens for which the model's table of positions has no row."""

    template = (
        "{where}: {tokens} tokens ask for row {row} of the table {table}, which has rows 0 to {last}.\n"
        "  hint: shorten the input to what the model was made for, or keep what matters of it (tamis.prompts)."
    )


class UnreadableData(CorruptModel):
    """A file of arrays is none, or holds Python objects, which would need pickle."""

    template = "{path}: cannot be read as NumPy arrays: {reason}.\n  hint: write it with numpy.savez(path, NAME=array)."
