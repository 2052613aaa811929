"""Data for `--verify` and `--calibrate`: arrays from `.npz` or `.npy` as calls of a model, in batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..call_errors import UnreadableData
from ..error_text import brief, first_line
from ..errors import BadParameter, InputMismatch, ModelNotFound
from .inputs import Call, Inputs, input_nodes

ROWS_PER_CALL = 32


def read_arrays(path: str | Path) -> dict[str, Any]:
    """Arrays by name; a `.npy` file holds one, called "".

    Raises:
        ModelNotFound: there is no such file.
        UnreadableData: it is no array file, or it holds Python objects, which would need pickle.
    """
    import numpy as np

    path = Path(path)
    if not path.is_file():
        raise ModelNotFound(path=path, hint="data is a .npz file with one array per input, or a .npy file.")
    try:
        loaded = np.load(path, allow_pickle=False)
        return {name: loaded[name] for name in loaded.files} if hasattr(loaded, "files") else {"": loaded}
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        reason = first_line(error).rstrip(".")
        if "pickled (object) data" in reason:  # what NumPy takes any file for that is none of its own
            reason = "it is no .npz or .npy file, or holds Python objects, which would need pickle"
        raise UnreadableData(path=path, reason=reason) from error


def calls_of(program: ExportedProgram, call: Call, path: str | Path, rows: int = ROWS_PER_CALL) -> Iterator[Call]:
    """Calls with the file's rows: `rows` at a time, or the example's batch size where the batch is static.

    Numbers are converted to the dtype of the input; the device is the example's.  Inputs that are None in the example
    call need no array.

    Raises:
        InputMismatch: names, dtypes' kinds, ranks or row counts do not fit.
    """
    leaves, spec = pytree.tree_flatten(call)
    nodes = input_nodes(program)
    wanted = {n.name: x for n, x in zip(nodes, leaves, strict=False) if isinstance(x, Tensor)}
    arrays = read_arrays(path)
    if set(arrays) == {""}:
        arrays = {next(iter(wanted), "input"): arrays[""]}
    _check_names(arrays, wanted, path)
    tensors = {name: _converted(name, arrays[name], example, path) for name, example in wanted.items()}
    counts = {x.shape[0] for x in tensors.values()}
    if len(counts) != 1:
        rule, hint = "all arrays must have the same number of rows", "row i of each array is one example."
        _refuse(path, rule, sorted(counts), hint)
    count = counts.pop()
    if count == 0:
        _refuse(path, "arrays must have rows", "none", "row i of each array is one example.")
    first = next(n for n in nodes if n.name in wanted)
    static = isinstance(first.meta["val"].shape[0], int)
    size = leaves[nodes.index(first)].shape[0] if static else rows
    if static and count % size:
        _refuse(path, f"rows must come in batches of {size}", count, "the model's batch size is static.")
    for start in range(0, count, size):
        batch = [
            tensors[n.name][start : start + size] if n.name in wanted else x
            for n, x in zip(nodes, leaves, strict=False)
        ]
        args, kwargs = pytree.tree_unflatten(batch, spec)
        yield args, kwargs


def prompts_of(where: str, program: ExportedProgram, call: Call, data: Any) -> list[Call]:
    """Calls of one row from a file, as `calls_of` has them, or from a list of mappings, tuples or tensors.

    Raises:
        BadParameter: it is neither, or there is no prompt.
        InputMismatch: a prompt names inputs that the program does not have.
    """
    if isinstance(data, str | os.PathLike):
        return list(calls_of(program, call, os.fspath(data), rows=1))
    hint = "a list with a mapping, a tuple or a tensor for each prompt, or a .npz file."
    if isinstance(data, Mapping | Tensor) or not isinstance(data, Iterable):
        raise BadParameter(where=where, name="data", rule="a list of prompts", got=brief(data), hint=hint)
    inputs = Inputs.of(program)
    calls = []
    for one in data:
        args, kwargs = ((), one) if isinstance(one, Mapping) else (one if isinstance(one, tuple) else (one,), {})
        calls.append(inputs.bind(args, kwargs))
    if not calls:
        raise BadParameter(where=where, name="data", rule="prompts, one or more", got="none", hint=hint)
    return calls


def _converted(name: str, array: Any, example: Tensor, path: str | Path) -> Tensor:
    hint = "convert the array; only the width of a number is adapted."
    if array.dtype.kind not in "fiub":
        _refuse(path, f"{name} must hold numbers", f"dtype {array.dtype}", hint)
    value = torch.from_numpy(array)
    if value.is_floating_point() != example.is_floating_point():
        _refuse(path, f"{name} must be {example.dtype}", f"dtype {array.dtype}", hint)
    if value.ndim != example.ndim or value.ndim == 0:
        shape = list(example.shape)
        _refuse(path, f"{name} must have {example.ndim} dimensions like {shape}", list(array.shape), "rows come first.")
    return value.to(example.device, example.dtype)


def _check_names(arrays: dict[str, Any], wanted: dict[str, Tensor], path: str | Path) -> None:
    if set(arrays) != set(wanted):
        names, shown = ", ".join(wanted), ", ".join(f"{name}=..." for name in wanted)
        _refuse(path, f"needs one array per input ({names})", ", ".join(arrays) or "none", f"np.savez(path, {shown}).")


def _refuse(path: str | Path, rule: str, got: Any, hint: str) -> None:
    raise InputMismatch(where=path, rule=rule, got=got, hint=hint)
