"""docs/models.md lists what the tests run on."""

from __future__ import annotations

from models_page import PAGE, render


def test_the_page_lists_the_zoo() -> None:
    assert PAGE.read_text() == render(PAGE.read_text()), "python tests/models_page.py writes it anew"


def test_a_page_without_the_tables_would_be_noticed() -> None:
    page = PAGE.read_text()
    assert render(page.replace("SiglipVisionModel", "SomethingElse")) == page
