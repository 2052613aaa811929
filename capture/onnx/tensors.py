"""Tensors of an ONNX file: types, sizes held against the bytes that are there, and their values as torch tensors."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo
from torch import Tensor

from ...onnx_errors import ExternalDataMissing, MalformedGraph, TypeUnsupported, UnsafeExternalData

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.BOOL: torch.bool,
    TensorProto.COMPLEX64: torch.complex64,
    TensorProto.COMPLEX128: torch.complex128,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}
MOST_AXES = 64  # of an array of numpy
AS_BITS = {1: np.uint8, 2: np.uint16}  # how torch takes the types that numpy itself does not have
HINT = "tamis reads numbers and booleans; types of less than a byte, and text, are for other tools."
FIELDS: dict[
    int, tuple[str, int]
] = {  # where a tensor without raw bytes keeps its values, and how many entries of the field one value takes
    TensorProto.FLOAT: ("float_data", 1),
    TensorProto.COMPLEX64: ("float_data", 2),
    TensorProto.DOUBLE: ("double_data", 1),
    TensorProto.COMPLEX128: ("double_data", 2),
    TensorProto.INT64: ("int64_data", 1),
    TensorProto.UINT32: ("uint64_data", 1),
    TensorProto.UINT64: ("uint64_data", 1),
}


def dtype_of(number: int, path: str, where: str) -> torch.dtype:
    """The torch dtype of an ONNX element type; raises TypeUnsupported, which says where it was met."""
    if number not in DTYPES:
        known = number in TensorProto.DataType.values()
        got = TensorProto.DataType.Name(number).lower() if known else f"number {number}, which is no type"  # type: ignore[arg-type]
        raise TypeUnsupported(path=path, where=where, got=got, hint=HINT)
    return DTYPES[number]


def check_tensor(proto: TensorProto, path: str, folder: Path) -> None:
    """Hold a tensor's declared type and sizes against its data; nothing is allocated for what is only declared.

    Raises:
        MalformedGraph: negative sizes, sizes whose product overflows, too few or too many bytes or values.
        TypeUnsupported: text, or types of less than a byte.
        UnsafeExternalData, ExternalDataMissing: see `_external_file`.
    """
    where = f"tensor {proto.name!r}"
    dtype = dtype_of(proto.data_type, path, where)
    count = math.prod(proto.dims)
    if len(proto.dims) > MOST_AXES:
        raise MalformedGraph(path=path, reason=f"{where} has {len(proto.dims)} axes")
    if any(size < 0 for size in proto.dims):
        raise MalformedGraph(path=path, reason=f"{where} has a negative size in {list(proto.dims)}")
    nbytes = count * dtype.itemsize
    if nbytes > 2**63 - 1:
        raise MalformedGraph(path=path, reason=f"{where} has sizes {list(proto.dims)}, more than can be addressed")
    if proto.data_location == TensorProto.EXTERNAL:
        _check_external(proto, nbytes, path, folder)
        return
    if proto.HasField("raw_data"):
        got, expected, unit = len(proto.raw_data), nbytes, "bytes"
    else:
        name, each = FIELDS.get(proto.data_type, ("int32_data", 1))
        got, expected, unit = len(getattr(proto, name)), count * each, f"values in {name}"
    if got != expected:
        reason = f"{where} has {got} {unit} where {_shown(proto, dtype)} takes {expected}"
        raise MalformedGraph(path=path, reason=reason)


def _shown(proto: TensorProto, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(proto.dims)}"


def _check_external(proto: TensorProto, nbytes: int, path: str, folder: Path) -> None:
    try:
        info = ExternalDataInfo(proto)
    except (ValueError, OverflowError) as error:
        raise MalformedGraph(path=path, reason=f"tensor {proto.name!r} locates its data badly: {error}") from error
    file = _external_file(proto.name, info.location or "", path, folder)
    offset, length, size = info.offset or 0, info.length, file.stat().st_size
    if length is not None and length != nbytes:
        reason = f"tensor {proto.name!r} has {length} bytes where its type and sizes take {nbytes}"
        raise MalformedGraph(path=path, reason=reason)
    if offset < 0 or offset + nbytes > size:
        reason = f"which has {size} bytes, not the {offset + nbytes} up to the end of this tensor"
        raise ExternalDataMissing(path=path, tensor=proto.name, location=info.location, reason=reason)


def _external_file(tensor: str, location: str, path: str, folder: Path) -> Path:
    """The file at a location: the model's own, or a plain file below `folder` that is reached without links.

    Raises:
        UnsafeExternalData: the location is absolute, climbs out, or passes a link.
        ExternalDataMissing: there is no such file.
    """

    def unsafe(reason: str) -> UnsafeExternalData:
        return UnsafeExternalData(path=path, tensor=tensor, location=location, reason=reason)

    if folder / location == Path(path):
        return Path(path)
    parts = location.replace("\\", "/").split("/")
    if not location or "\0" in location:
        raise unsafe("which names no file")
    if os.path.isabs(location) or location.startswith(("/", "\\")) or ":" in parts[0]:
        raise unsafe("an absolute path")
    if ".." in parts:
        raise unsafe("which climbs out of the model's folder")
    file = folder
    for part in (part for part in parts if part not in ("", ".")):
        file = file / part
        if file.is_symlink():
            raise unsafe(f"and {part!r} is a link")
    if not file.is_file():
        raise ExternalDataMissing(path=path, tensor=tensor, location=location, reason="which is not there")
    if file.stat().st_nlink > 1:
        raise unsafe("which other names are linked to")
    return file


def as_torch(tensor: ir.TensorProtocol, folder: Path | None = None) -> Tensor:
    """The values of a checked tensor.

    External data is mapped, not read (private pages: writing to the tensor leaves the file alone), unless it lies where
    no number of its size may; bytes inside the file are taken over without a further copy.
    """
    dtype = DTYPES[int(tensor.dtype)]
    shape = tuple(int(size) for size in tensor.shape)  # type: ignore[arg-type]
    if isinstance(tensor, ir.ExternalTensor) and 0 not in shape:
        assert folder is not None
        bits = np.dtype(f"u{dtype.itemsize}") if dtype.itemsize <= 8 else np.dtype(np.complex128)
        file, offset = folder / tensor.location, tensor.offset or 0
        if offset % bits.itemsize:
            return torch.from_numpy(np.fromfile(file, bits, math.prod(shape), offset=offset).reshape(shape)).view(dtype)
        return torch.from_numpy(np.memmap(file, bits, "c", offset=offset, shape=shape)).view(dtype)
    return from_numpy(tensor.numpy().reshape(shape), dtype)


def from_numpy(array: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor over the array's memory; bfloat16 and the float8 types are those of ml_dtypes."""
    array = np.require(array, requirements="C").reshape(np.shape(array))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # read-only: the bytes belong to the array alone
        if array.dtype.type.__module__ != "numpy":
            bits = torch.from_numpy(array.view(AS_BITS[array.dtype.itemsize]))
            return bits.view(dtype or getattr(torch, array.dtype.name))
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
