"""How each op of a program that has a form on ONNX Runtime's own operators would be written, for reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.export import ExportedProgram

from ..op import OnnxCall
from .splice import fake_mode_of, op_of, without_guards


@dataclass(frozen=True)
class Form:
    """One node: the function on ONNX Runtime's own operators that a file calls for it, or why there is none.

    function  its name; "" where the file has standard operators
    reason    why it has; "" where it has not
    """

    node: fx.Node
    function: str
    reason: str


def contrib_forms(program: ExportedProgram) -> list[Form]:
    """The forms of a program's nodes in order, as `export_onnx` with `contrib` writes them."""
    found = []
    with without_guards(fake_mode_of(program.graph)):
        for node in program.graph.nodes:
            op = op_of(node)
            if op is None or op.contrib is None:
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: one.meta["val"])
            made = op.contrib(*args, **kwargs)
            found.append(Form(node, made.name, "") if isinstance(made, OnnxCall) else Form(node, "", made))
    return found
