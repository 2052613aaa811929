"""`check_onnx`: an ONNX file run in ONNX Runtime against torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import BackendMismatch, ExportFailed, MissingDependency

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def check_onnx(
    path: str | os.PathLike[str],
    reference: Callable[..., Any],
    inputs: Iterable[Inputs | tuple[Any, ...]],
    budget: float = 1e-4,
    *,
    shown: str | None = None,
) -> float:
    """Run the file at each of the inputs and return the largest relative L2 difference of any output.

    reference  the program, its module, or any callable with the user's signature
    inputs     (args, kwargs) pairs, or plain tuples of arguments; sizes other than the example's are what this is for
    shown      what errors call the file

    Integer and boolean outputs must be equal.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        ExportFailed: ONNX Runtime cannot load or run the file.
        BackendMismatch: an output differs by more than the budget, or in shape.
    """
    name = shown or str(path)
    session = _session(path, name)
    call = reference.module() if isinstance(reference, torch.export.ExportedProgram) else reference
    worst = 0.0
    for one in inputs:
        args, kwargs = one if len(one) == 2 and isinstance(one[0], tuple) and isinstance(one[1], dict) else (one, {})
        with torch.no_grad():
            expected = [value for value in pytree.tree_leaves(call(*args, **kwargs)) if value is not None]
        given = [value for value in pytree.tree_leaves((args, kwargs)) if value is not None]
        got = _run(session, given, name)
        shapes = ", ".join(str(tuple(value.shape)) for value in given if isinstance(value, Tensor))
        for output, want, have in zip(session.get_outputs(), expected, got, strict=True):
            difference = _difference(want, have)
            worst = max(worst, difference)
            if not difference <= budget:  # also when it is NaN
                fields = {"output": output.name, "difference": difference, "shapes": shapes, "budget": budget}
                raise BackendMismatch(where=name, backend="ONNX Runtime", **fields)
    return worst


def _session(path: str | os.PathLike[str], name: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            what="running the ONNX file", package="onnxruntime", install="tamis[cpu]"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportFailed(path=name, kind="ONNX", reason=f"ONNX Runtime cannot load it: {error}", hint=_hint(error)) from error


def _run(session: Any, given: list[Any], name: str) -> list[Tensor]:
    """Outputs as tensors.  Values go in and out as OrtValues, because numpy has no bfloat16."""
    try:
        feeds = {one.name: _as_numpy(value) for one, value in zip(session.get_inputs(), given, strict=True)}
        return [torch.from_numpy(np.asarray(value)) for value in session.run(None, feeds)]
    except Exception as error:
        raise ExportFailed(path=name, kind="ONNX", reason=f"ONNX Runtime cannot run it: {error}", hint=_hint(error)) from error


def _as_numpy(value: Any) -> np.ndarray[Any, Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _hint(error: Exception) -> str:
    text = str(error).lower()
    if "bfloat16" in text or "bf16" in text:
        return "ONNX Runtime has no bfloat16 kernels on CPU; export the model in float16 or float32."
    return "this is a bug in tamis or in an exporter; please report the model and the recipe."


def _difference(want: Tensor, have: Tensor) -> float:
    """Relative L2 difference; infinite where shapes, or integers, differ."""
    want = torch.as_tensor(want).detach().cpu()
    if want.shape != have.shape:
        return float("inf")
    if not want.is_floating_point():
        return 0.0 if torch.equal(want, have.to(want.dtype)) else float("inf")
    want, have = want.double(), have.double()
    same = (want == have) | (want.isnan() & have.isnan())  # infinities too
    error = torch.where(same, 0.0, want - have).norm()
    return float(error / torch.where(want.isfinite(), want, 0.0).norm().clamp(min=1e-12))
