"""`OnnxModel`: an exported file as a torch module: ONNX Runtime runs it, on torch's own memory.

On a GPU (package onnxruntime-gpu) inputs and outputs stay there, bound without a copy; where ONNX Runtime has no CUDA
provider, or torch no GPU, it runs on the CPU, and one log line says why.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from ..error_text import first_line
from ..errors import InputMismatch, MissingDependency, TargetMissing

_ELEMENTS = {
    torch.float64: TensorProto.DOUBLE,
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
# as ONNX Runtime writes them: tensor(float)
_TYPES = {dtype: TensorProto.DataType.Name(element).lower() for dtype, element in _ELEMENTS.items()}
log = logging.getLogger(__name__)


class OnnxModel(nn.Module):
    """An ONNX file, loaded.  Call it with tensors, in the file's order or by its names.

    One output comes back as a tensor, several as a dict by name.  Inputs on another device than the session's are
    moved there; outputs are where the session is.

    device  where the session runs
    note    why that is not a GPU, where one was wanted; "" otherwise
    """

    def __init__(self, path: str, device: str = "auto") -> None:
        """`device`: "auto" (a GPU where ONNX Runtime and torch both have one), "cpu" or "cuda".

        Raises:
            MissingDependency: ONNX Runtime is not installed.
            TargetMissing: "cuda" where there is none.
            BackendCannotRun: ONNX Runtime cannot load the file.
        """
        super().__init__()
        self.device, self.note = _choose(device)
        if self.note:
            log.warning("%s runs on the CPU: %s", path, self.note)
        self.session = _open(path, self.device)
        self.inputs = {one.name: one for one in self.session.get_inputs()}
        self.outputs = [one.name for one in self.session.get_outputs()]
        self.eval()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Run the file.

        Raises:
            InputMismatch: arguments are missing, unknown or too many.
        """
        given = self._by_name(args, kwargs)
        binding = self.session.io_binding()
        # bound by address, so the tensors must live until the run is over
        tensors = {name: value.detach().to(self.device).contiguous() for name, value in given.items()}
        place = self.device.type, self.device.index or 0
        for name, value in tensors.items():
            binding.bind_input(name, *place, _ELEMENTS[value.dtype], tuple(value.shape), value.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, *place)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime has a stream of its own
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            got = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items())
            rule = "sizes must be those of the file's inputs"
            raise InputMismatch(where="ONNX file", rule=rule, got=got, hint=first_line(error)) from error
        # dlpack has no bool of ONNX Runtime's: it comes as bytes
        results = [
            from_dlpack(value).view(torch.bool) if value.data_type() == "tensor(bool)" else from_dlpack(value)
            for value in binding.get_outputs()
        ]
        return results[0] if len(results) == 1 else dict(zip(self.outputs, results, strict=True))

    def _by_name(self, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {**dict(zip(self.inputs, args, strict=False)), **kwargs}
        if given.keys() != self.inputs.keys() or len(args) + len(kwargs) != len(given):
            rule, got = (
                f"its inputs are {', '.join(self.inputs)}",
                f"{len(args)} by position and {sorted(kwargs)} by name",
            )
            raise InputMismatch(where="ONNX file", rule=rule, got=got, hint="give each once.")
        for name, value in given.items():
            wanted = self.inputs[name].type.removeprefix("tensor(").removesuffix(")")
            found = _TYPES.get(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            if found != wanted:
                rule = f"{name} must be a tensor of {wanted}"
                raise InputMismatch(where="ONNX file", rule=rule, got=found or str(value.dtype), hint="convert it.")
        return given


def _choose(device: str) -> tuple[torch.device, str]:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(what="running the ONNX file", package="onnxruntime", install="tamis[cpu]") from error
    if device == "cpu":
        return torch.device("cpu"), ""
    note = ""
    if not torch.cuda.is_available():
        note = "torch sees no CUDA device"
    elif "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        note = "this ONNX Runtime has no CUDA provider (the package onnxruntime-gpu has)"
    if note and device != "auto":
        raise TargetMissing(target=f"{device} ({note})")
    # a machine without any GPU is no surprise to anyone
    return torch.device("cpu" if note else "cuda"), note if torch.cuda.is_available() else ""


def _open(path: str, device: torch.device) -> Any:
    from ..lowering.onnx_check import open_session

    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    return open_session(path, path, providers=providers)
