"""Every error tamis raises, one class per condition.

A message says where (pass, site, node, line of the user's model), what rule was broken, what was got, and what to do.
`exit_code` is what `optimize-model` exits with:
    1  tamis, or something it runs on, failed where it should not have
    2  what was given cannot be used: the command line, a file, a parameter; or a model that cannot be captured, has no
       tokens to reduce, or reads tokens in a way that the passes asked for cannot keep
    3  the model can be treated, but a pass found nothing to change in it
    4  accuracy budget missed
    5  slower than the original
"""

from __future__ import annotations

from typing import Any, ClassVar


class TamisError(Exception):
    """Base of all errors; subclasses fill `template` with the fields they are raised with."""

    template: ClassVar[str] = "{message}"
    exit_code: ClassVar[int] = 1

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        super().__init__(self.template.format(**fields))

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.fields)


def _rebuild(cls: type[TamisError], fields: dict[str, Any]) -> TamisError:
    return cls(**fields)


# --- input: what the user handed over -------------------------------------------------------------------------------


class ModelNotFound(TamisError):
    template = "{path}: no such file or directory.\n  hint: {hint}"
    exit_code = 2


class UnknownModelName(ModelNotFound):
    template = "{path}: {reason}.\n  hint: {hint}"


class UnknownModelFormat(TamisError):
    template = "{path}: do not know how to read this as a model.\n  hint: give {accepted}."
    exit_code = 2


class CorruptModel(TamisError):
    template = "{path}: cannot be read as {kind}: {reason}.\n  hint: export the model again; the file may be cut short."
    exit_code = 2


class PickleRefused(TamisError):
    template = (
        "{path}: member {member!r} needs pickle, which can run code, and was not loaded ({reason}).\n"
        "  hint: save the program again without custom objects among its example inputs or weights."
    )
    exit_code = 2


class UnsafeProgram(TamisError):
    template = (
        "{path}: member {member!r} holds {what}, which would run as code, and was not loaded.\n"
        "  hint: export the model again from its source, and be wary of where this file comes from."
    )
    exit_code = 2


class UntrustedNativeCode(TamisError):
    template = (
        "{path}: is an AOTInductor package, which is native code.\n"
        "  hint: pass trusted=True if you know where it comes from."
    )
    exit_code = 2


class FactoryFailed(TamisError):
    template = (
        "{spec}: {reason}.\n"
        "  hint: name a function without arguments that returns (model, args) or (model, args, kwargs)."
    )
    exit_code = 2


class TrainingMode(TamisError):
    template = (
        "{model}: the model is in training mode, so dropout and batch statistics would be captured.\n"
        "  hint: call model.eval() first."
    )
    exit_code = 2


class ExampleInputsMissing(TamisError):
    template = "{model}: example inputs are needed to capture this model.\n  hint: {hint}"
    exit_code = 2


class MissingDependency(TamisError):
    template = "{what} needs the package {package!r}, which is not installed.\n  hint: pip install {install}"
    exit_code = 2


class InputMismatch(TamisError):
    template = "{where}: {rule}, got {got}.\n  hint: {hint}"
    exit_code = 2


class CaptureFailed(TamisError):
    template = "{model}: torch.export cannot capture it: {reason}{where}.\n  hint: {hint}"
    exit_code = 2


class DataDependentControlFlow(CaptureFailed):
    template = (
        "{model}: its control flow depends on the data in its tensors, which no graph can hold: {reason}{where}.\n"
        "  hint: {hint}"
    )


# --- analysis: what the model is ------------------------------------------------------------------------------------


class NoAttention(TamisError):
    template = (
        "{model}: no attention was found ({looked_for}).\n"
        "  hint: tamis removes tokens from transformers; a convolutional network has none to remove."
    )
    exit_code = 2


class UnknownAttention(TamisError):
    template = (
        "{model}: {count} softmax(es) look like attention, but none is any that tamis knows: at {node}, "
        "{reason}.\n"
        "  hint: tamis knows softmax(q k^T * scale + mask) v; attention that does more to its logits is not supported."
    )
    exit_code = 2


class NoTokenStream(TamisError):
    template = (
        "{model}: found {sites} attention site(s) but no stream of tokens through them: at {node}{where}, {reason}.\n"
        "  hint: {hint}"
    )
    exit_code = 2


class WindowedAttention(NoTokenStream):
    template = (
        "{model}: attention at {node}{where} runs inside windows: it sees {seen} tokens of a batch that was regrouped "
        "by {regroup}, not the whole sequence.\n"
        "  hint: windowed models (Swin and its kin) need every token of the grid in place; no token reduction applies."
    )


# --- passes: what was asked for -------------------------------------------------------------------------------------


class UnknownPass(TamisError):
    template = "unknown pass {name!r}{nearest}\n  hint: optimize-model --list-passes shows all of them."
    exit_code = 2


class BadPassText(TamisError):
    template = (
        "cannot read the pass {text!r}: {reason}.\n  hint: write name:key=value,key=value, for example tome:r=13."
    )
    exit_code = 2


class UnknownParameter(TamisError):
    template = "{where}: no parameter {name!r}{nearest}\n  hint: {hint}"
    exit_code = 2


class BadParameter(TamisError):
    template = "{where}: {name} must be {rule}, got {got}.\n  hint: {hint}"
    exit_code = 2


class TooManyRemoved(TamisError):
    template = (
        "{where}: r={r} tokens cannot be removed from {tokens} tokens of which {protected} are protected; "
        "at most {most} can.\n  hint: use r={most} or less, or a schedule that falls, such as r={most}->0."
    )
    exit_code = 2


class NothingChanged(TamisError):
    template = (
        "{passes}: asked for, but nothing in the model changed.\n{reasons}\n"
        "  hint: allow_noop=True (--allow-noop) accepts a result equal to the original."
    )
    exit_code = 3


# --- rewriting: what the token axis does not survive ----------------------------------------------------------------


class PositionRead(TamisError):
    template = (
        "{where}: node {node} reads token {position} by its position, but after {method} at layer {layer} tokens have "
        "moved and only the first {prefix} stay in place (shape was {before}, is {after}).\n"
        "  hint: read the class token, pool over tokens, or keep the layers before this read unreduced (layers=...)."
    )
    exit_code = 2


class TokenAxisUnsupported(TamisError):
    template = (
        "{where}: node {node} ({op}) needs every token in its place, but {method} at layer {layer} {lost} (shape was "
        "{before}, is {after}): {reason}.\n"
        "  hint: {hint}"
    )
    exit_code = 2


class TokenShapeConflict(TamisError):
    template = (
        "{where}: node {node} ({op}) does not accept the reduced token count (shape was {before}, is {after}): "
        "{reason}.\n"
        "  hint: this is a gap in tamis's token-axis rules; please report the node and its source line."
    )


class MethodFailed(TamisError):
    template = "{where}: the method {method} failed on tokens {shape}: {reason}.\n  hint: {hint}"


class BrokenInvariant(TamisError):
    template = "after {where}: {reason}.\n  hint: this is a bug in tamis; please report it with the recipe."


# --- results: what came out -----------------------------------------------------------------------------------------


class DriftTooLarge(TamisError):
    template = (
        "{where}: output drift {drift:.4g} is over the budget {budget:.4g} "
        "(largest relative L2 difference of any row).\n"
        "  hint: remove fewer tokens or skip early layers; the report lists tokens per layer."
    )
    exit_code = 4


class SlowerThanOriginal(TamisError):
    template = "{where}: the result runs at {speedup:.2f}x of the original's speed at {shapes}.\n  hint: {hint}"
    exit_code = 5


class BackendMismatch(TamisError):
    template = (
        "{where}: {backend} and torch disagree: output {output} differs by {difference:.3g} (relative L2) at {shapes}; "
        "{budget:.3g} is allowed.\n  hint: nothing was kept; please report the model and the recipe."
    )


class ExportFailed(TamisError):
    template = "{path}: could not be written as {kind}: {reason}.\n  hint: {hint}"


class BackendCannotRun(ExportFailed):
    template = "{path}: {backend} cannot run it: {reason}.\n  hint: {hint}"


class OutputExists(TamisError):
    template = "{path}: exists already and was left alone.\n  hint: overwrite=True (--overwrite) replaces it."
    exit_code = 2


class OutputNotWritable(TamisError):
    template = (
        "{path}: cannot be written ({reason}).\n  hint: choose a directory that exists and that you may write to."
    )
    exit_code = 2


class WrongUsage(TamisError):
    template = "{problem}.\n  hint: {hint}"
    exit_code = 2


class UnknownOutputFormat(TamisError):
    template = "{path}: cannot tell from the name what to write.\n  hint: end it in .onnx, .pt2, or / for a directory."
    exit_code = 2


class OriginalMissing(TamisError):
    template = (
        "{what}: a model loaded from a file has no original to compare with.\n"
        "  hint: fast.with_original(graph) gives it one; graph is tamis.capture.capture(model, inputs)."
    )
    exit_code = 2


class TargetMissing(TamisError):
    template = (
        "target {target}: this machine has no such device.\n"
        "  hint: leave target out, or name an architecture (cuda:sm_90) to compile its kernels here."
    )
    exit_code = 2


class UnknownTarget(TamisError):
    template = (
        "unknown target {text!r}.\n"
        "  hint: use auto, cpu, cuda, or cuda: or rocm: with an architecture, which is one of {known}."
    )
    exit_code = 2
