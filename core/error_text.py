"""What other people's exceptions say, as far as it fits into a line of ours."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that is not empty; its class where there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
