"""One cell of the exporter matrix: a file captured, compared with ONNX Runtime, reduced, written, and run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnx_exports import HALF, exported
from onnx_models import MODELS, Exportable
from torch import Tensor

import tamis
from tamis.capture import capture
from tamis.errors import TokenAxisUnsupported

CLOSE = 1e-4  # of float32, entry by entry, absolute and relative
CLOSE_IN_NORM = 2e-3  # of float16, where both runtimes round every result in their own way
NOT_VALID = "no valid file"
REFUSED = "refused"


def run_file(path: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """ONNX Runtime's outputs by name."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    results = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return {one.name: torch.from_numpy(x) for one, x in zip(session.get_outputs(), results, strict=True)}


def by_name(result: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Outputs by name, as a module made of a file gives them when there are several."""
    return result if isinstance(result, dict) else {names[0]: result}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The same outputs of the same types and shapes, and as close as their type allows."""
    assert list(got) == list(want)
    for name, value in want.items():
        assert bool(value.isfinite().all()), f"{name}: ONNX Runtime's is not finite"
        if value.dtype == torch.float16:
            assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
            off = (got[name].double() - value.double()).norm() / value.double().norm()
            assert off <= CLOSE_IN_NORM, f"{name}: relative L2 {off:.1e}"
        else:
            torch.testing.assert_close(
                got[name], value, rtol=CLOSE, atol=CLOSE, msg=lambda text, name=name: f"{name}: {text}"
            )


def cell(name: str, exporter: str, folder: Path) -> str:
    """What the page says of a model's file by an exporter; raises where something does not hold.

    `2, 17 → 12`: two attention sites were found, and of the 17 tokens of the example 12 are left at the end.
    `refused`: no pass can run; the file is written without one.
    """
    case, path = MODELS[name], exported(name, exporter)
    if not _is_valid(path):
        return NOT_VALID
    graph = capture(str(path))
    streams = [site.role for site in graph.sites].count("stream")
    assert (streams, len(graph.sites) - streams) == case.sites
    assert len(graph.layers) == streams
    runs = [_typed(case.inputs(*sizes), exporter) for sizes in case.sizes]
    for inputs in runs:
        with torch.no_grad():
            assert_close(by_name(graph.program.module()(*inputs.values()), tuple(case.outputs)), run_file(path, inputs))
    found = "+".join(str(count) for count in case.sites if count)
    passes = method(case, exporter)
    try:
        fast = tamis.compile(str(path), passes=passes, allow_noop=not passes)
    except TokenAxisUnsupported:
        fast, found = tamis.compile(str(path), passes=[], allow_noop=True), f"{found}, {REFUSED}"
    fast.export(folder / "fast.onnx")
    for inputs in runs:
        assert_close(run_file(folder / "fast.onnx", inputs), by_name(fast(**_renamed(inputs)), tuple(case.outputs)))
    if not case.reduced or REFUSED in found:
        return found
    rows = fast.report.layers
    assert all(row.tokens_out < row.tokens_in for row in rows)
    return f"{found}, {rows[0].tokens_in} → {rows[-1].tokens_out}"


def method(case: Exportable, exporter: str) -> str | list[Any]:
    """The pass of a cell: in float16 the choice of tokens does not depend on numbers, if tokens may be dropped."""
    if not case.reduced:
        return []
    if exporter in HALF and not case.needs_all:
        return "random:r=1" + case.options
    return "tome:keep_ratio=0.8" + case.options


def _typed(inputs: dict[str, Tensor], exporter: str) -> dict[str, Tensor]:
    half = exporter in HALF
    return {name: x.half() if half and x.is_floating_point() else x for name, x in inputs.items()}


def _renamed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names that Python has for the inputs."""
    return {name.replace(".", "_"): x for name, x in inputs.items()}


def _is_valid(path: Path) -> bool:
    """Whether ONNX Runtime takes the file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph:
        return False
    return True
