"""A model that draws random numbers is captured with a warning that names where."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from zoo import FAMILIES

from tamis.capture.canonical import canonicalise
from tamis.capture.export import export_module
from tamis.capture.randomness import drawn, warn_of_draws


class Draws(nn.Module):
    """Tokens in a random order, as ViTMAE shuffles them where no noise is given."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        noise = torch.rand(x.shape[:2]) if noise is None else noise
        return self.drop(x).gather(1, noise.argsort(1).unsqueeze(-1).expand(x.shape))


def exported(*inputs: Tensor):
    return canonicalise(export_module(Draws().eval(), inputs, {}, name="m"))


def test_a_draw_inside_forward_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tamis"):
        warn_of_draws(exported(torch.zeros(2, 5, 3)), "m")
    (record,) = (r for r in caplog.records if r.name == "tamis")
    assert record.getMessage().startswith(f"m: node rand ({__file__}:")
    assert "draws random numbers at every call" in record.getMessage()


def test_numbers_given_as_an_input_are_no_draw(caplog: pytest.LogCaptureFixture) -> None:
    program = exported(torch.zeros(2, 5, 3), torch.rand(2, 5))
    with caplog.at_level(logging.WARNING, logger="tamis"):
        warn_of_draws(program, "m")
    assert not drawn(program)
    assert not [r for r in caplog.records if r.name == "tamis"]


def test_attention_and_idle_dropout_draw_nothing() -> None:
    family = FAMILIES["hf_vit"]
    args, kwargs = family.inputs(2)
    assert not drawn(canonicalise(export_module(family.shared(), args, kwargs, name="vit")))
