"""`load_program`: read a `.pt2` file without running anything that is in it.

`torch.export.load` unpickles example inputs, some weights and constants, evaluates the text of shape expressions and
executes the text of guards.  Here every member is inspected first, through the reader and from the open file that the
loading uses afterwards, and only what needs none of that power is loaded.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import posixpath
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from torch.export import ExportedProgram

from ..error_text import first_line
from ..errors import CorruptModel, ModelNotFound, PickleRefused, UnsafeProgram, UntrustedNativeCode
from .program_text import find_code

KIND = "an exported program (.pt2)"
NATIVE = (".so", ".dylib", ".dll", ".o", ".a", ".cubin", ".hsaco")


def load_program(path: str | Path) -> ExportedProgram:
    """Load a program that `torch.export.save` of torch 2.8 or newer wrote.

    Raises:
        ModelNotFound: there is no such file.
        CorruptModel: it is cut short, not an archive, or not a program; files of torch 2.7 and older as well.
        UntrustedNativeCode: it is an AOTInductor package.
        PickleRefused: a member cannot be read with `weights_only=True`.
        UnsafeProgram: the program's text would run code other than tensor operations and arithmetic on sizes.

    Nothing is added to what `weights_only` allows.  Weights stored as raw bytes, the usual case, are always fine.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelNotFound(path=path, hint="name a .pt2 file written by torch.export.save.")
    _register_ops()
    with path.open("rb") as file:
        with _damage_reported(path):
            members = _read_members(path, file)
        for name in members.names:
            if name.startswith("data/aotinductor/") or name.endswith(NATIVE):
                raise UntrustedNativeCode(path=path)
        with _damage_reported(path):
            _refuse_pickles(path, members)
            _refuse_code(path, members)
            return _load(path, file)


class _Members:
    """The members of an archive as torch's own reader sees them."""

    def __init__(self, file: IO[bytes]) -> None:
        from torch.export.pt2_archive import PT2ArchiveReader

        self._reader = PT2ArchiveReader(file)  # type: ignore[arg-type]
        self.names: list[str] = self._reader.get_file_names()

    def read(self, name: str) -> bytes:
        return self._reader.read_bytes(name)


def _read_members(path: Path, file: IO[bytes]) -> _Members:
    if not zipfile.is_zipfile(file):
        raise CorruptModel(path=path, kind=KIND, reason="it is not an archive, or its end is missing")
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        doubled = len(names) != len(set(names))
        broken = archive.testzip()
    if "version" in names:
        raise CorruptModel(path=path, kind=KIND, reason="it was saved by torch 2.7 or older")
    if doubled or broken:
        reason = f"member {broken!r} is damaged" if broken else "two members have one name"
        raise CorruptModel(path=path, kind=KIND, reason=reason)
    file.seek(0)
    return _Members(file)


def _load(path: Path, file: IO[bytes]) -> ExportedProgram:
    from torch.export.pt2_archive._package import load_pt2  # torch.export.load falls back to formats not inspected here

    file.seek(0)
    programs = load_pt2(file).exported_programs  # type: ignore[arg-type]
    if len(programs) != 1:
        raise CorruptModel(path=path, kind=KIND, reason=f"it holds {len(programs)} programs instead of one")
    return next(iter(programs.values()))


@contextlib.contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    """Turn whatever the readers raise on bad files into CorruptModel; torch logs nothing meanwhile."""
    log = logging.getLogger("torch.export.pt2_archive._package")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except (CorruptModel, PickleRefused, UnsafeProgram):
        raise
    except Exception as error:
        raise CorruptModel(path=path, kind=KIND, reason=first_line(error).rstrip(".")) from error
    finally:
        log.setLevel(level)


# --- pickles --------------------------------------------------------------------------------------------------------


def _refuse_pickles(path: Path, members: _Members) -> None:
    for name in sorted(set(members.names) & {*_pickled(members)}):
        if posixpath.basename(name).startswith(("custom_obj_", "opaque_obj_")):
            raise PickleRefused(path=path, member=name, reason="it is a custom object")
        content = members.read(name)
        try:
            if content:
                torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        except Exception as error:
            raise PickleRefused(path=path, member=name, reason=_why(error)) from error


def _pickled(members: _Members) -> Iterator[str]:
    """Names of members that loading would unpickle."""
    for name in members.names:
        folder, base = posixpath.split(name)
        if folder == "data/sample_inputs" or (base.endswith(".pt") and folder in ("data/weights", "data/constants")):
            yield name
        if base.startswith(("custom_obj_", "opaque_obj_")):
            yield name
        if name.endswith("_config.json") and folder in ("data/weights", "data/constants"):
            for payload in json.loads(members.read(name))["config"].values():
                if payload["use_pickle"]:
                    yield posixpath.join(folder, payload["path_name"])


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())
    found = text.find("Unsupported global: GLOBAL ")
    if found >= 0:
        return f"it asks for {text[found + 27 :].split(' ')[0]}"
    return "it is not a file of plain tensors"


# --- text -----------------------------------------------------------------------------------------------------------


def _refuse_code(path: Path, members: _Members) -> None:
    for name in members.names:
        if name.startswith("models/") and (what := find_code(json.loads(members.read(name).decode()))):
            raise UnsafeProgram(path=path, member=name, what=what)


def _register_ops() -> None:
    """Make tamis's ops known, so that programs that hold them load."""
    import importlib

    importlib.import_module("tamis.kernels")
