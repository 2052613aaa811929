"""Errors about sparse attention; the rules of `errors` hold."""

from __future__ import annotations

from .errors import TamisError


class IndexBroken(TamisError):
    """An attention index breaks a rule that attention over it relies on."""

    template = (
        "attention index: {rule}, but {got}.\n"
        "  hint: mend the method that made it (see AttentionIndex), or unset TAMIS_CHECK_INDEX to run on."
    )
