"""What a model is called on the command line, and whether it is there; imports neither torch nor model libraries."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelNotFound, UnknownModelFormat

ACCEPTED = "a .pt2 or .onnx file, timm:NAME, hf:DIR_OR_ID, a directory with config.json, or file.py:function"


@dataclass(frozen=True)
class Spec:
    """A model's name, read: kind "timm", "hf", "factory", "pt2" or "onnx"; `value` its name or path."""

    kind: str
    value: str
    function: str = ""


def check_exists(spec: str | os.PathLike[str]) -> Spec:
    """Read a model's name and look whether its file or directory is there.

    Names that only a library or a hub can know (`timm:NAME`, `hf:ORG/NAME`) are not looked up.

    Raises:
        ModelNotFound: there is no such file or directory.
        UnknownModelFormat: it is there, but is nothing that can be read.
    """
    text = os.fspath(spec)
    kind, _, rest = text.partition(":")
    if kind == "timm" and rest:
        return Spec("timm", rest)
    if kind == "hf" and rest:
        return Spec("hf", _hf(rest))
    factory = re.fullmatch(r"(.+\.py):(\w+)", text)
    if factory:
        return Spec("factory", _existing(factory[1]), factory[2])
    return _file(text)


def _hf(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        return _with_config(path)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):  # no such hub id, so a path was meant
        _existing(name)
        raise UnknownModelFormat(path=name, accepted="hf: and a directory with config.json")
    return name


def _file(text: str) -> Spec:
    path = Path(_existing(text))
    if path.is_dir():
        return Spec("hf", _with_config(path))
    if path.suffix in (".pt2", ".onnx"):
        return Spec(path.suffix[1:], str(path))
    if path.suffix == ".py":
        raise UnknownModelFormat(path=text, accepted=f"the function that makes the model: {text}:FUNCTION")
    raise UnknownModelFormat(path=text, accepted=ACCEPTED)


def _with_config(path: Path) -> str:
    if not (path / "config.json").is_file():
        raise UnknownModelFormat(path=path, accepted="a directory with config.json and model.safetensors")
    return str(path)


def _existing(text: str) -> str:
    path = Path(text).expanduser()
    if path.exists():
        return str(path)
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else f"give {ACCEPTED}."
    raise ModelNotFound(path=text, hint=hint)
