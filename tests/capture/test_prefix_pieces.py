"""Prefix tokens that were joined in several steps."""

from __future__ import annotations

import pytest
from rewriting import captured


@pytest.mark.parametrize(("name", "prefix"), [("hf_dinov2", 1), ("hf_dinov2_registers", 5), ("hf_deit", 2), ("ast", 2)])
def test_every_token_that_does_not_depend_on_the_input_is_prefix(name: str, prefix: int) -> None:
    graph = captured(name)
    assert (graph.prefix, graph.class_token) == (prefix, True)
