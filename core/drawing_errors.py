"""What can go wrong when a picture of token reduction is drawn."""

from __future__ import annotations

from .errors import TamisError


class CannotDraw(TamisError):
    """What is to be drawn is not the journey of the patches of one image."""

    template = "{where}: no picture can be drawn: {reason}.\n  hint: {hint}"
    exit_code = 2
