"""Native packages: what AOTInductor makes of a compiled model, which runs without any Python code of tamis.

    fast.save("model.pt2", native=True)
    torch._inductor.aoti_load_package("model.pt2")     # where tamis is not installed, or from C++
    tamis.load("model.pt2", trusted=True)              # with report and recipe

On a GPU our Triton kernels are inside as binaries; the package runs on the kind of device it was made on.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..error_text import first_line
from ..errors import CorruptModel, ExportFailed, InputMismatch
from ..opaque import carried_in
from ..report import Report
from .embedded import EXTRA, extra_of, read_extra
from .files import whole
from .inputs import Inputs, input_nodes
from .recipe import Recipe

if TYPE_CHECKING:
    from .compiled import CompiledModel


@dataclass(frozen=True)
class Input:
    """What native code takes for granted of one tensor, and reads memory wrongly without.

    shape  sizes, None where any will do;  order  axes from the slowest to the fastest in memory
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    order: tuple[int, ...]

    @staticmethod
    def of(node: fx.Node, example: Tensor) -> Input:
        """Of an input of a program and its example."""
        sizes = node.meta["val"].shape
        strides = example.stride()
        order = sorted(range(example.dim()), key=lambda axis: (-strides[axis], axis))
        shape = tuple(size if isinstance(size, int) else None for size in sizes)
        return Input(node.name, str(example.dtype), shape, tuple(order))

    def checked(self, value: Tensor) -> Tensor:
        """The tensor in the layout of the example; raises InputMismatch."""
        fits = len(self.shape) == value.dim() and all(
            size in (None, given) for size, given in zip(self.shape, value.shape, strict=True)
        )
        if not fits or str(value.dtype) != self.dtype:
            wanted = f"{self.dtype} [{', '.join('any' if size is None else str(size) for size in self.shape)}]"
            got = f"{value.dtype} {list(value.shape)}"
            hint = "convert it; native code is for the sizes and the type of the example, batch and length apart."
            raise InputMismatch(where="native package", rule=f"{self.name} must be {wanted}", got=got, hint=hint)
        inverse = sorted(range(value.dim()), key=self.order.__getitem__)
        return value.permute(self.order).contiguous().permute(inverse)


class NativeModel(nn.Module):
    """A native package, loaded.  Call it as the model it was made of; it has no graph, so it cannot be exported again.

    report, recipe  as the `CompiledModel` had them
    """

    def __init__(self, run: Any, call: Inputs, inputs: Sequence[Input], report: Report, recipe: Recipe) -> None:
        super().__init__()
        self.run, self.call, self.inputs, self.report, self.recipe = run, call, tuple(inputs), report, recipe
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, computed without autograd.

        Raises:
            InputMismatch: tensors of another number, type or size than the package was made for.
        """
        leaves, spec = pytree.tree_flatten(self.call.bind(args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if len(tensors) != len(self.inputs):
            rule = f"it takes {', '.join(one.name for one in self.inputs)}"
            raise InputMismatch(
                where="native package", rule=rule, got=f"{len(tensors)} tensors", hint="give each once."
            )
        checked = (one.checked(value) for one, value in zip(self.inputs, tensors, strict=True))
        leaves = [next(checked) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        with torch.no_grad():
            return self.run(*args, **kwargs)

    def extra_repr(self) -> str:
        """The headline of the report."""
        return self.report.headline()


def save_native(model: CompiledModel, path: str, *, overwrite: bool) -> str:
    """Write the package; see `CompiledModel.save`."""
    from ..lowering.callables import ahead_of_time

    if ops := carried_in(model.graph.graph):
        reason = f"only ONNX Runtime evaluates these operators of the file it was made from: {ops}"
        hint = "save it without native code, or export an ONNX file, which has these operators as they were."
        raise ExportFailed(path=path, kind="a native package", reason=reason, hint=hint)
    with whole(Path(path), overwrite) as temporary:
        try:
            ahead_of_time(model.graph.program, temporary)
        except Exception as error:
            hint = "save it without native code, or report the model and the recipe."
            raise ExportFailed(path=path, kind="a native package", reason=first_line(error), hint=hint) from error
        call = Inputs.of(model.graph.program)
        takes = {"call": asdict(call), "inputs": [asdict(one) for one in inputs_of(model)]}
        _add_member(temporary, json.dumps({**extra_of(model), **takes}))
    return path


def inputs_of(model: CompiledModel) -> list[Input]:
    """What the package will take for granted of the model's tensors, in flat order."""
    nodes = input_nodes(model.graph.program)
    leaves = pytree.tree_leaves(model.example_call)
    given = zip(nodes, leaves, strict=True)
    return [Input.of(node, leaf) for node, leaf in given if isinstance(leaf, Tensor)]


def _add_member(path: Path, text: str) -> None:
    """What tamis keeps beside the code, under the root that torch gave the archive."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/extra/{EXTRA}", text)


def load_native(path: str) -> NativeModel:
    """Load a package that tamis made, which runs its native code.  Raises PlainProgram, CorruptModel."""
    extra = read_extra(path)
    try:
        run = torch._inductor.aoti_load_package(path)
    except Exception as error:
        kind = "a native package for this machine"
        raise CorruptModel(path=path, kind=kind, reason=first_line(error)) from error
    inputs = [Input(one["name"], one["dtype"], tuple(one["shape"]), tuple(one["order"])) for one in extra["inputs"]]
    takes = extra["call"]
    call = Inputs(tuple(takes["positional"]), tuple(takes["keyword"]), takes["fixed"])
    return NativeModel(run, call, inputs, Report.from_dict(extra["report"]), Recipe.from_dict(extra["recipe"], path))
