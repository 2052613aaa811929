"""Errors about ONNX files as input; the rules of `errors` hold."""

from __future__ import annotations

from .errors import TamisError


class UnsafeExternalData(TamisError):
    """A tensor's data would be read from somewhere else than the model's folder."""

    template = (
        "{path}: tensor {tensor!r} keeps its data at {location!r}, {reason}, so it was not read.\n"
        "  hint: data must lie in plain files in the folder of the model, or below it."
    )
    exit_code = 2


class ExternalDataMissing(TamisError):
    """A tensor's data file is not there, or too short."""

    template = (
        "{path}: tensor {tensor!r} keeps its data in {location!r}, {reason}.\n"
        "  hint: copy the data file to the folder of the model; one without the other is no model."
    )
    exit_code = 2


class MalformedGraph(TamisError):
    """Names, order or sizes in the file contradict each other."""

    template = (
        "{path}: not a valid ONNX graph: {reason}.\n  hint: onnx.checker.check_model says the same; export it again."
    )
    exit_code = 2


class OpsetUnknown(TamisError):
    """The file is newer than the table of operations."""

    template = (
        "{path}: uses version {got} of the operators of {domain}, and {newest} is the newest that tamis knows.\n"
        "  hint: export with opset_version={newest}, or convert it with onnx.version_converter."
    )
    exit_code = 2


class TypeUnsupported(TamisError):
    """Text, maps, or numbers of less than a byte."""

    template = "{path}: {where} is of type {got}, which has no place in a graph of tensors.\n  hint: {hint}"
    exit_code = 2


class UnknownOps(TamisError):
    """Operations that the table lacks and that cannot be carried through, all of them."""

    template = (
        "{path}: {count} operator(s) are not known to tamis, and ONNX Runtime cannot evaluate them: {ops}.\n"
        "  hint: put their definitions into the file as functions of standard operators, or export without the "
        "optimisation that made them; docs/onnx_support.md lists what is known."
    )
    exit_code = 2


class OpaqueFailed(TamisError):
    """A node carried through does not run, or not as it did when the model was captured."""

    template = (
        "node {node} ({op}) of an ONNX file, which ONNX Runtime evaluates, failed: {reason}.\n"
        "  hint: call the model with other inputs or sizes; capture it at such sizes if the file itself runs there."
    )


class OpaqueInTheWay(TamisError):
    """Nothing that passes could reduce was found, and operations without a form in torch may be why."""

    template = (
        "{reason}.\n"
        "  the file's operators without a form in torch, any of which may hide it: {ops}\n"
        "  hint: export without the optimisation that made them; a file without a pass is written as it is."
    )
    exit_code = 2


class OpaqueOnStream(TamisError):
    """Operations without a form in torch stand between the places that a pass must touch."""

    template = (
        "{where}: node {node} ({op}) has no form in torch and stands between layers that {method} reduces, so no rule "
        "says what becomes of its tokens.\n"
        "  the file's operators without a form: {ops}\n"
        "  hint: name the layers to reduce, all on one side of it (layers=...), or export without the optimisation "
        "that made it."
    )
    exit_code = 2


class ReducedBefore(TamisError):
    """A file that passes of tamis made."""

    template = (
        "{path}: was made by tamis with {passes}, and cannot be reduced again.\n"
        "  hint: put all passes in one recipe for the original model, where they compose."
    )
    exit_code = 2


class NodeFailed(TamisError):
    """A node's function raised, or does not do what the node asks for."""

    template = (
        "{path}: node {node} ({op}) cannot be evaluated: {reason}.\n"
        "  hint: check that ONNX Runtime runs the file; if it does, please report the node and its attributes."
    )


class ValueUnknown(TamisError):
    """A size or condition depends on data."""

    template = (
        "{path}: node {node} ({op}) needs the value of {what} when the model is captured, but it depends on data.\n"
        "  hint: sizes and conditions must follow from shapes and constants; export with them fixed."
    )
