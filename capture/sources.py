"""`resolve`: whatever names or is a model, to a model with example inputs."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..error_text import brief
from ..errors import MissingDependency, UnknownModelFormat, UnknownModelName
from ..graph import Interface
from ..parameters import keywords
from .dims import Axes
from .factory import call_factory
from .paths import ACCEPTED, Spec, check_exists
from .safe_pt2 import load_program

if TYPE_CHECKING:
    from types import ModuleType


@dataclass(frozen=True)
class Source:
    """A model and an example call of it.

    kind       "module", "program", "pt2", "onnx", "timm", "hf" or "factory"
    directory  where a model's tokenizer and config files lie, which belong beside what is made of it
    note       what the user should know, such as that weights are random
    axes       dynamic dimensions, where the model's file names them;  interface  all names that it gives
    """

    model: nn.Module | ExportedProgram
    args: Any = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = "model"
    kind: str = "module"
    directory: Path | None = None
    note: str = ""
    axes: Axes | None = None
    interface: Interface | None = None


def resolve(spec: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Source:
    """Find or build the model that `spec` is or names.

    Args:
        spec: a `Source`, an `nn.Module` (an `fx.GraphModule` is one), an `ExportedProgram`, or text or a path:
            `x.pt2`, `x.onnx` (example inputs are made from its declared shapes and types), `timm:NAME` (pretrained
            weights if they are in the local cache, else random ones; nothing is downloaded), `hf:DIR_OR_ID`
            (safetensors only; no code that comes with a model is run), or `file.py:function`, a function without
            arguments that returns a model, (model, args) or (model, args, kwargs).
        args, kwargs: example inputs; used instead of those that come with the model.

    Raises:
        ModelNotFound, UnknownModelName, UnknownModelFormat: nothing there, or nothing that can be read.
        MissingDependency: timm or transformers is needed and not installed.
        FactoryFailed: the user's function failed or returned something else.
        CorruptModel, PickleRefused, UnsafeProgram, UntrustedNativeCode: see `safe_pt2.load_program` and `hf`.
        MalformedGraph, UnknownOps and their kin, InputMismatch: see `onnx.source`.
    """
    given = keywords("compile", kwargs)
    if isinstance(spec, Source):
        return spec
    if isinstance(spec, ExportedProgram):
        return _with_inputs(Source(spec, name="program", kind="program"), args, given)
    if isinstance(spec, nn.Module):
        return Source(spec, args, given, name=type(spec).__name__)
    if not isinstance(spec, str | os.PathLike):
        raise UnknownModelFormat(path=brief(spec), accepted=f"an nn.Module, an ExportedProgram, {ACCEPTED}")
    read = check_exists(spec)
    if read.kind == "onnx":
        return _onnx(read, args, given)
    source = {"timm": _timm, "hf": _hf, "factory": _factory, "pt2": _pt2}[read.kind](read)
    return _with_inputs(source, args, given)


def _with_inputs(source: Source, args: Any, kwargs: dict[str, Any]) -> Source:
    """The given example inputs if there are any, else the program's own, else the source's."""
    empty = isinstance(args, tuple | list | Mapping) and not args
    if not empty or kwargs:
        chosen = (args, kwargs)
    elif isinstance(source.model, ExportedProgram) and source.model.example_inputs is not None:
        chosen = source.model.example_inputs
    else:
        chosen = (source.args, source.kwargs)
    return Source(source.model, *chosen, source.name, source.kind, source.directory, source.note)


def _onnx(spec: Spec, args: Any, kwargs: dict[str, Any]) -> Source:
    from .onnx.source import load_onnx

    path = Path(spec.value)
    loaded = load_onnx(spec.value, args, kwargs)
    return Source(
        loaded.module,
        loaded.args,
        name=path.stem,
        kind="onnx",
        directory=path.parent,
        axes=loaded.axes,
        interface=loaded.interface,
    )


def _pt2(spec: Spec) -> Source:
    path = Path(spec.value)
    return Source(load_program(path), name=path.stem, kind="pt2", directory=path.parent)


def _factory(spec: Spec) -> Source:
    model, args, kwargs = call_factory(Path(spec.value), spec.function)
    return Source(model, args, kwargs, name=spec.function, kind="factory", directory=Path(spec.value).parent)


def _hf(spec: Spec) -> Source:
    from .hf import load_hf

    model, kwargs = load_hf(spec.value, required("transformers", f"hf:{spec.value}"))
    path = Path(spec.value)
    return Source(model, (), kwargs, name=path.name, kind="hf", directory=path if path.is_dir() else None)


def _timm(spec: Spec) -> Source:
    timm = required("timm", f"timm:{spec.value}")
    name = spec.value
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists all names."
        raise UnknownModelName(path=f"timm:{name}", reason="timm has no model of this name", hint=hint)
    weights = _cached_weights(timm, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # noqa: TID251 - forked: timm draws its weights from the global generator
        overlay = {"pretrained_cfg_overlay": {"file": weights}} if weights else {}
        model = timm.create_model(name, pretrained=bool(weights), **overlay).eval()
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    note = "" if weights else "weights are random (seed 0): pretrained ones are not in the local cache"
    return Source(model, (images,), name=name, kind="timm", note=note)


def _cached_weights(timm: ModuleType, name: str) -> str | None:
    """Path of the pretrained safetensors in the local hub cache, None when they are not there."""
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return None
    found = try_to_load_from_cache(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
    return found if isinstance(found, str) and found.endswith(".safetensors") else None


def required(package: str, what: str) -> ModuleType:
    """Import an optional package; raises MissingDependency."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependency(what=what, package=package, install="'tamis[models]'") from error
