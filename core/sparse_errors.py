"""Errors about sparse attention; the rules of `errors` hold."""

from __future__ import annotations

from .errors import NothingChanged, TamisError


class IndexBroken(TamisError):
    """An attention index breaks a rule that attention over it relies on."""

    template = (
        "attention index: {rule}, but {got}.\n"
        "  hint: mend the method that made it (see AttentionIndex), or unset TAMIS_CHECK_INDEX to run on."
    )


class NothingToMeasure(NothingChanged):
    """Sparse attention of which no layer of a model takes any, so that nothing can be said of it."""

    template = (
        "{where}: no layer takes {passes}.\n{reasons}\n"
        "  hint: optimize-model MODEL --check lists the passes that a model takes."
    )
