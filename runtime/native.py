"""Native packages: what AOTInductor makes of a compiled model, which runs without any Python code of tamis.

    fast.save("model.pt2", native=True)
    torch._inductor.aoti_load_package("model.pt2")     # where tamis is not installed, or from C++
    tamis.load("model.pt2", trusted=True)              # with report and recipe

On a GPU our Triton kernels are inside as binaries; the package runs on the kind of device it was made on.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ExportFailed
from ..opaque import carried_in
from ..report import Report
from .embedded import EXTRA, extra_of, read_extra
from .files import whole
from .recipe import Recipe

if TYPE_CHECKING:
    from .compiled import CompiledModel


class NativeModel(nn.Module):
    """A native package, loaded.  Call it as the model it was made of; it has no graph, so it cannot be exported again.

    report, recipe  as the `CompiledModel` had them
    """

    def __init__(self, run: Any, report: Report, recipe: Recipe) -> None:
        super().__init__()
        self.run, self.report, self.recipe = run, report, recipe
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, computed without autograd."""
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
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            hint = "save it without native code, or report the model and the recipe."
            raise ExportFailed(path=path, kind="a native package", reason=reason, hint=hint) from error
        _add_member(temporary, json.dumps(extra_of(model)))
    return path


def _add_member(path: Path, text: str) -> None:
    """What tamis keeps beside the code, under the root that torch gave the archive."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/extra/{EXTRA}", text)


def load_native(path: str) -> NativeModel:
    """Load a package that tamis made, which runs its native code.  Raises PlainProgram, CorruptModel."""
    extra = read_extra(path)
    run = torch._inductor.aoti_load_package(path)
    return NativeModel(run, Report.from_dict(extra["report"]), Recipe.from_dict(extra["recipe"], path))
