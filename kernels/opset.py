"""Opsets of the model-local ONNX functions: domain `tamis`, bodies in standard operators of opset 18."""

from __future__ import annotations

from typing import Any

from onnxscript import opset18
from onnxscript.values import Opset

TAMIS = Opset("tamis", 1)
STANDARD = opset18


def rule_inputs(rule: list[int]) -> list[list[int]]:
    """A flat CountRule as three ONNX inputs: its slopes a, offsets b and divisors c, int64 vectors of one length."""
    return [rule[1::3], rule[2::3], rule[3::3]]


Tensor = Any  # onnxscript values; their types are checked by ONNX, not by Python
