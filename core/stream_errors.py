"""Errors about streams of tokens that are there and cannot be reduced."""

from __future__ import annotations

from .errors import NoTokenStream


class PackedBatch(NoTokenStream):
    """One row holds the tokens of a whole batch."""

    template = (
        "{model}: attention at {node}{where} works on one row that holds the tokens of all {images} images, so tokens "
        "of different images would merge.\n"
        "  hint: a model that packs its batch cannot be reduced; give each image a row of its own."
    )
