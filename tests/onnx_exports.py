"""The ONNX files that common exporters make of the models in `onnx_models`, made once in a run of the tests."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxslim
import torch
from onnx_models import LAYERS, MODELS, ByName, Decoding
from torch import Tensor

__all__ = ["EXPORTERS", "HALF", "LAYERS", "MODELS", "exported", "inputs_of"]


def inputs_of(name: str, batch: int, length: int = 9) -> dict[str, Tensor]:
    """Inputs by name; of text, the last row is padded."""
    return MODELS[name].inputs(batch, length)


@functools.cache
def folder() -> Path:
    """Where files of this run lie."""
    return Path(tempfile.mkdtemp(prefix="tamis-onnx-"))


@functools.cache
def exported(name: str, exporter: str) -> Path:
    """The file of a model by one of `EXPORTERS`; raises what the exporter raises."""
    path = folder() / f"{name}-{exporter}.onnx"
    with _quietly():
        EXPORTERS[exporter](name, path)
    return path


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# --- exporters ------------------------------------------------------------------------------------------------------


def torchscript(name: str, path: Path, opset: int, attention: str) -> None:
    """torch.onnx.export(dynamo=False); before opset 14 it refuses scaled_dot_product_attention."""
    case = MODELS[name]
    torch.onnx.export(
        case.module(attention),
        tuple(case.inputs(2, 9).values()),
        path,
        dynamo=False,
        opset_version=opset,
        dynamic_axes={**case.dims, **case.outputs},
        input_names=list(case.dims),
        output_names=list(case.outputs),
    )


def dynamo(name: str, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """torch.onnx.export(dynamo=True)."""
    case = MODELS[name]
    model = case.module(case.dynamo_attention).to(dtype)
    shapes: Any = tuple(_dims(axes) for axes in case.dims.values())
    torch.onnx.export(
        model,
        tuple(x.to(dtype) if x.is_floating_point() else x for x in case.inputs(2, 9).values()),
        path,
        dynamo=True,
        dynamic_shapes=(shapes,) if isinstance(model, ByName | Decoding) else shapes,
        external_data=False,
        verbose=False,
        input_names=list(case.dims),
        output_names=list(case.outputs),
    )


def _dims(axes: dict[int, str]) -> dict[int, Any]:
    """Named dimensions; one that is a sum of others has no name in torch."""
    return {
        axis: torch.export.Dim(name) if name.isidentifier() else torch.export.Dim.DYNAMIC for axis, name in axes.items()
    }


def slim(name: str, path: Path) -> None:
    """onnxslim on what dynamo made."""
    onnx.save(onnxslim.slim(str(exported(name, "dynamo"))), path)


def optimized(name: str, path: Path) -> None:
    """ONNX Runtime's transformer optimizer, as its command line has it, on the attention it looks for: written out."""
    from onnxruntime.transformers.optimizer import optimize_model

    source = path.with_suffix(".source.onnx")
    torchscript(name, source, 17, "eager")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        made = optimize_model(str(source), model_type=MODELS[name].optimizer, num_heads=0, hidden_size=0)
    finally:
        logging.disable(level)
    made.save_model_to_file(str(path))


def converted(name: str, path: Path) -> None:
    """ONNX Runtime's conversion to float16, inputs and outputs too, of what the TorchScript exporter made."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(exported(name, "torchscript"))), path)


EXPORTERS: dict[str, Callable[[str, Path], None]] = {
    "dynamo": dynamo,
    "torchscript11": functools.partial(torchscript, opset=11, attention="eager"),
    "torchscript13": functools.partial(torchscript, opset=13, attention="eager"),
    "torchscript": functools.partial(torchscript, opset=17, attention="sdpa"),
    "slim": slim,
    "optimized": optimized,
    "half": functools.partial(dynamo, dtype=torch.float16),
    "converted": converted,
}
HALF = {"half", "converted"}  # those that make files of float16
