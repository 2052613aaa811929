"""`export_module`: a module and example inputs to an exported program with dynamic batch and sequence."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.export import ExportedProgram

from ..error_text import first_line
from ..errors import CaptureFailed, DataDependentControlFlow, ExampleInputsMissing, TamisError, TrainingMode
from .dims import Axes, find_axes, widened
from .examples import SHAPES, check_example, check_shapes
from .program import with_ranges

log = logging.getLogger("tamis")
_OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_STDLIB = sysconfig.get_path("stdlib")


def export_module(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    name: str = "model",
) -> ExportedProgram:
    """Export a module in eval mode (float32, float16 or bfloat16) with `torch.export`, not in strict mode.

    With "auto", dimension 0 of every tensor that shares the first tensor's batch size is dynamic, and so is dimension
    1 of 2-D integer inputs (token ids, masks, token types) of the common length.  Examples of size 1 there are
    repeated to 2, because export would specialise them.  Where the model ties these dimensions to others or to a
    divisor, the ties that export finds are kept.  A dimension that cannot be dynamic becomes static with a warning of
    the logger "tamis", never silently.  The result accepts size 1 in the dynamic dimensions.

    Args:
        model: the module; `fx.GraphModule` works too.
        args: positional inputs, a tuple or list (or one tensor); values may be nested in dicts and lists.  A single
            dict whose keys are parameters of `forward` is spread as keywords, as tokenizers' results are meant.
        kwargs: keyword inputs.
        dynamic_shapes: "auto", named dimensions, or what `torch.export.export` takes, which is passed on as it is.
        name: what the model is called in errors.

    Raises:
        TrainingMode: the model, or a submodule that behaves differently in training, is in training mode.
        ExampleInputsMissing: forward needs inputs and none were given.
        DataDependentControlFlow: a Python branch or size depends on the values of a tensor.
        CaptureFailed: export failed for another reason.
    """
    check_shapes(dynamic_shapes)
    _refuse_training(model, name)
    args, kwargs = _normalised(model, args, dict(kwargs or {}))
    if not args and not kwargs and _needs_inputs(model):
        raise ExampleInputsMissing(model=name, hint="pass them as args=(tensor, ...) or kwargs={'name': tensor}.")
    check_example(model, args, kwargs, name)
    with torch.no_grad(), _without_cache(model):
        if not isinstance(dynamic_shapes, str | Axes):
            return _export_once(model, args, kwargs, dynamic_shapes, name)
        axes = dynamic_shapes if isinstance(dynamic_shapes, Axes) else find_axes(args, kwargs)
        args, kwargs = widened(args, kwargs, axes)
        return _export_dynamic(model, args, kwargs, axes, name)


def _export_once(model: nn.Module, args: Any, kwargs: Any, shapes: Any, name: str) -> ExportedProgram:
    try:
        return _export(model, args, kwargs, shapes)
    except Exception as error:
        _raise(error, name, shapes is not None)


def _export_dynamic(model: nn.Module, args: Any, kwargs: Any, axes: Axes, name: str) -> ExportedProgram:
    """Named dims, then the fixes that export suggests, then dims that export infers, then a static sequence."""
    shapes = axes.shapes(model, args, kwargs, axes.named())
    first: Exception | None = None
    for attempt in ("named", "fixed", "inferred", "static sequence"):
        if attempt == "inferred":
            shapes = axes.shapes(model, args, kwargs, axes.inferred())
        elif attempt == "static sequence":
            shapes = axes.shapes(model, args, kwargs, axes.leading()) if axes.has_sequence else None
        if shapes is None:
            continue
        try:
            program = _export(model, args, kwargs, shapes)
        except Exception as error:
            first = first or error
            if _is_data_dependent(error) or not (_is_violation(error) or axes.has_sequence):
                break
            shapes = axes.fixed(error, shapes) if attempt == "named" else None
            continue
        for axis in axes.static_in(program):
            log.warning("%s: %s is static at %d: the model does not work at other sizes", name, *axis)
        return _accept_one(program)
    assert first is not None
    _raise(first, name)


def _export(model: nn.Module, args: Any, kwargs: Any, shapes: Any) -> ExportedProgram:
    with _quiet_torch():
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _accept_one(program: ExportedProgram) -> ExportedProgram:
    """Lower the ranges [2, oo) that inferred dims get to [1, oo).

    The 2 is an assumption of the exporter (0 and 1 are specialised elsewhere), not a finding about the model; real
    lower bounds are above it or are written as guards.
    """
    ranges = dict(program.range_constraints)
    assumed = {symbol: r for symbol, r in ranges.items() if r.lower == 2}
    if not assumed:
        return program
    return with_ranges(program, {**ranges, **{symbol: type(r)(1, r.upper) for symbol, r in assumed.items()}})


# --- the model and its inputs ---------------------------------------------------------------------------------------


def _refuse_training(model: nn.Module, name: str) -> None:
    # An unlifted exported program says training=True whatever it was exported in, so its modules are asked instead.
    own = model.training and not isinstance(model, torch.fx.GraphModule)
    noisy = (path for path, module in model.named_modules() if path and module.training and _differs(module))
    path = next(noisy, None)
    if own or path is not None:
        raise TrainingMode(model=name if own else f"{name} (submodule {path})")


def _differs(module: nn.Module) -> bool:
    """Whether a module computes something else in training: dropout, batch statistics, stochastic depth."""
    dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    batch_norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return dropout or batch_norm or bool(getattr(module, "drop_prob", 0))


def _normalised(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(args, Mapping):
        args = (args,)
    args = tuple(args) if isinstance(args, tuple | list) else (args,)
    if len(args) == 1 and isinstance(args[0], Mapping) and _takes_keywords(model, args[0]):
        return (), {**args[0], **kwargs}
    return args, kwargs


def _takes_keywords(model: nn.Module, values: Mapping[str, Any]) -> bool:
    parameters = inspect.signature(model.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return bool(values) and all(key in parameters or anything for key in values)


def _needs_inputs(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Hugging Face configs with use_cache=True, set to False for a while: caches are objects no graph can return.

    Passing use_cache=False as a keyword would make it an input of the exported program.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs = {key: config for key, config in configs.items() if getattr(config, "use_cache", None) is True}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


# --- what went wrong ------------------------------------------------------------------------------------------------


def _is_violation(error: Exception) -> bool:
    return getattr(getattr(error, "error_type", None), "name", "") == "CONSTRAINT_VIOLATION"


def _is_data_dependent(error: Exception) -> bool:
    return type(error).__name__ == "GuardOnDataDependentSymNode" or "data-dependent" in first_line(error).lower()


def _raise(error: Exception, name: str, shaped: bool = False) -> NoReturn:
    if isinstance(error, TamisError):  # of a model that is ours to run: it says itself what is wrong
        raise error
    raise _explained(error, name, shaped) from error


def _explained(error: Exception, name: str, shaped: bool) -> CaptureFailed:
    where = _user_line(error)
    reason = first_line(error)
    if _is_data_dependent(error):
        hint = "use torch.where, or torch.cond, or move the decision out of the model."
        return DataDependentControlFlow(model=name, reason="a branch or a size needs a value", where=where, hint=hint)
    if shaped and "dynamic_shapes" in reason:
        hint = SHAPES
    elif _is_violation(error):
        hint = "say which dimensions change with dynamic_shapes=, as in torch.export."
    else:
        hint = "check that model(*args, **kwargs) itself runs on these example inputs."
    return CaptureFailed(model=name, reason=reason.rstrip(".!"), where=where, hint=hint)


def _user_line(error: Exception) -> str:
    """` at file:line (code)`: the innermost frame outside torch and the standard library."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    return f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


def _is_library(filename: str) -> bool:
    torch_or_ours = filename.startswith(("<", *_OURS))
    return torch_or_ours or (filename.startswith(_STDLIB) and "site-packages" not in filename)


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Export logs and prints whole graphs before it raises; the error says it better.  Successes lose nothing."""
    names = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
    loggers = [(logging.getLogger(n), logging.getLogger(n).level) for n in names]
    for logger, _ in loggers:
        logger.setLevel(logging.CRITICAL)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    finally:
        for logger, level in loggers:
            logger.setLevel(level)
    sys.stderr.write(printed.getvalue())
