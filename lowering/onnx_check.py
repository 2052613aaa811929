"""`check_onnx`: an ONNX file run in ONNX Runtime against torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import BackendCannotRun, BackendMismatch, MissingDependency

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Compared = Callable[[Inputs, int, Any], Any]


def check_onnx(
    path: str | os.PathLike[str],
    reference: Callable[..., Any],
    inputs: Iterable[Inputs | tuple[Any, ...]],
    budget: float = 1e-4,
    *,
    compared: Compared = lambda inputs, place, value: value,
    shown: str | None = None,
    as_written: bool = False,
) -> float:
    """Run the file at each of the inputs and return the largest relative L2 difference of any output.

    reference  the program, its module, or any callable with the user's signature
    inputs     (args, kwargs) pairs, or plain tuples of arguments; sizes other than the example's are what this is for
    compared   what of an output is held against what: from one of the inputs, the output's place and its value
    shown      what errors call the file
    as_written ONNX Runtime fuses nothing: where values are rounded to integers its fusions round elsewhere

    Integer and boolean outputs must be equal.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        BackendCannotRun: ONNX Runtime cannot load or run the file; in bfloat16 its CPU kernels are missing.
        BackendMismatch: an output differs by more than the budget, or in shape.
    """
    name = shown or str(path)
    session = open_session(path, name, packed=False, as_written=as_written)
    call = reference.module() if isinstance(reference, torch.export.ExportedProgram) else reference
    worst = 0.0
    for one in inputs:
        args, kwargs = one if len(one) == 2 and isinstance(one[0], tuple) and isinstance(one[1], dict) else (one, {})
        with torch.no_grad():
            expected = [value for value in pytree.tree_leaves(call(*args, **kwargs)) if value is not None]
        given = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        got = _run(path, session, given, name)
        shapes = ", ".join(str(tuple(value.shape)) for value in given)
        for place, (output, want, have) in enumerate(zip(session.get_outputs(), expected, got, strict=True)):
            difference = _difference(*(compared((args, kwargs), place, one) for one in (want, have)))
            worst = max(worst, difference)
            if not difference <= budget:  # also when it is NaN
                fields = {"output": output.name, "difference": difference, "shapes": shapes, "budget": budget}
                raise BackendMismatch(where=name, backend="ONNX Runtime", **fields)
    return worst


def open_session(
    path: str | os.PathLike[str],
    shown: str,
    *,
    threads: int = 0,
    packed: bool = True,
    as_written: bool = False,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
) -> Any:
    """The file in ONNX Runtime, on the CPU unless `providers` say otherwise.

    shown is what errors call it; threads=0 leaves them to ONNX Runtime;

    packed=False leaves weights as they are in the file: loading is faster and takes less memory, running is slower;
    as_written=True fuses nothing.

    Raises:
        MissingDependency, BackendCannotRun.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(what="running the ONNX file", package="onnxruntime", install="tamis[cpu]") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with _explained(path, shown):
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))


def _run(path: str | os.PathLike[str], session: Any, given: list[Any], name: str) -> list[Tensor]:
    with _explained(path, name):
        return [torch.from_numpy(np.asarray(value)) for value in session.run(None, feeds(session, given))]


def feeds(session: Any, values: Iterable[Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The session's inputs by name, from the flat inputs of a call; those that are None have no place in the file."""
    given = [value for value in values if value is not None]
    return {one.name: _as_numpy(value) for one, value in zip(session.get_inputs(), given, strict=True)}


@contextlib.contextmanager
def _explained(path: str | os.PathLike[str], name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason, hint = str(error), "this is a bug in tamis or in an exporter; please report the model and the recipe."
        if _has_bfloat16(path):
            reason = f"it computes in bfloat16, for which CPU kernels are missing ({reason})"
            hint = "export the model in float16 or float32, or leave out the check and run the file on a GPU."
        raise BackendCannotRun(path=name, kind="ONNX", backend="ONNX Runtime", reason=reason, hint=hint) from error


def _has_bfloat16(path: str | os.PathLike[str]) -> bool:
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception:
        return False
    types = [one.data_type for one in graph.initializer] + [one.type.tensor_type.elem_type for one in graph.input]
    return onnx.TensorProto.BFLOAT16 in types


def _as_numpy(value: Any) -> np.ndarray[Any, Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


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
