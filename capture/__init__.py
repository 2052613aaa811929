"""From the model in the user's hand to a `TokenGraph`: export, canonical form, analysis."""

if __name__ != "tamis.capture":
    raise ImportError("import tamis.capture, not capture: a second copy would register every op twice")

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..graph import TokenGraph


def capture(
    model: Any,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    name: str | None = None,
    any_model: bool = False,
) -> "TokenGraph":
    """Capture a model: its exported program in canonical form, with attention sites, token stream and cut points.

    Args:
        model: an `nn.Module` in eval mode, `fx.GraphModule`, `ExportedProgram`, a `Source`, or a path or name (`x.pt2`,
            `x.onnx`, `timm:NAME`, `hf:DIR_OR_ID`, `file.py:function`).
        args, kwargs: example inputs; batch and, for token ids, length become dynamic.  A batch-1 example works.
        dynamic_shapes: "auto" (an ONNX file's own dynamic dimensions), or as in `torch.export.export`.
        name: what to call the model in reports.
        any_model: accept a model without tokens to reduce; its graph has no layers.

    Raises:
        NoAttention, WindowedAttention, NoTokenStream: nothing here has tokens to reduce.
        TrainingMode, DataDependentControlFlow, CaptureFailed and input errors: see `capture.export` and `.sources`.
    """
    from dataclasses import replace

    from torch.export import ExportedProgram

    from .analysis import analyse, without_tables
    from .canonical import canonicalise
    from .decoder import as_prefill
    from .examples import check_fixed
    from .export import export_module
    from .sources import resolve

    source = resolve(model, args, kwargs)
    name = name or source.name
    program = source.model
    if isinstance(program, ExportedProgram):
        check_fixed(dynamic_shapes)
    else:
        program = as_prefill(program, name)
        shapes = source.axes if source.axes is not None and dynamic_shapes == "auto" else dynamic_shapes
        program = export_module(program, source.args, source.kwargs, dynamic_shapes=shapes, name=name)
    graph = analyse(canonicalise(program), name, any_model=any_model)
    return replace(without_tables(graph), interface=source.interface)
