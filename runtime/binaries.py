"""Kernels beside an artifact: written for a named architecture, and given to Triton on a machine that has one.

A binary is native code, so it is used only where the caller trusts the artifact; and only where Triton would have made
the same one: same version, same architecture.  Otherwise Triton compiles the kernels again when they are first called.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..errors import OutputExists, UnknownTarget
from ..lowering.cross_compile import FOLDER, LIST, CrossCompiled, cross_compile
from ..target import ARCHITECTURES, Target
from .files import check_file, staged

log = logging.getLogger(__name__)


def write_kernels(program: ExportedProgram, directory: Path, target: Target) -> CrossCompiled:
    """See `CompiledModel.write_kernels`; written whole or not at all."""
    if target.arch is None:
        raise UnknownTarget(text=f"{target} without an architecture", known=", ".join(ARCHITECTURES))
    for name in (FOLDER, LIST):
        if (directory / name).exists():
            raise OutputExists(path=directory / name)
        check_file(directory / name, overwrite=False)
    compiled = cross_compile(program, target.arch)
    with staged(directory) as stage:
        compiled.write(stage)
        for name in (FOLDER, LIST):  # the list last: without it the folder means nothing
            os.replace(stage / name, directory / name)
    return compiled


def use_binaries(folder: Path, *, trusted: bool) -> str:
    """Give the kernels in a folder to Triton, if there are any for the GPU of this machine.

    Returns one line on what was done and why; "" where the folder has none or the machine no GPU.
    """
    if not (folder / LIST).is_file() or not torch.cuda.is_available():
        return ""
    from ..kernels.triton.architecture import Architecture

    here = Architecture.of(torch.device("cuda")).name
    line = _install(folder, here) if trusted else "left alone: trusted=True uses them"
    log.info("kernels of %s: %s", folder, line)
    return f"compiled kernels: {line}"


def _install(folder: Path, architecture: str) -> str:
    import triton

    try:
        made_for, made_by, entries = _listed(folder)
        if made_for != architecture:
            return f"made for {made_for}, and this is {architecture}: compiled again when first called"
        if made_by != triton.__version__:
            return f"made by Triton {made_by}, and this is {triton.__version__}: compiled again when first called"
        found = [Entry.read(folder / FOLDER, one) for one in entries]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        log.info("kernels of %s cannot be read: %r", folder, error)
        return "unreadable: compiled again when first called"
    for one in found:
        install(one)
    return f"{len(found)} in use, made for {made_for} by Triton {made_by}"


def _listed(folder: Path) -> tuple[str, str, list[Any]]:
    """Architecture, version of Triton and kernels of a list, which anything may have been done to."""
    listed = json.loads((folder / LIST).read_text(encoding="utf-8"))
    made_for, made_by, entries = listed["architecture"], listed["versions"]["triton"], listed["kernels"]
    if not (isinstance(made_for, str) and isinstance(made_by, str) and isinstance(entries, list)):
        raise TypeError(f"{LIST}: not as it was written")
    return made_for, made_by, entries


@dataclass(frozen=True)
class Entry:
    """An entry of Triton's cache.

    key     64 hexadecimal digits
    kernel  its name
    files   their content by name
    """

    key: str
    kernel: str
    files: dict[str, bytes]

    @staticmethod
    def read(folder: Path, listed: dict[str, Any]) -> Entry:
        """What a list names, from a folder of entries.

        Raises:
            ValueError: the key is no hash, a name leads out of its folder, or the entry is, or holds, a link.
            OSError, TypeError, KeyError: it is not there, or not as it was written.
        """
        name, key, kernel = listed["name"], listed["cache_key"], listed["kernel"]
        entry = folder / name
        if not re.fullmatch(r"[0-9a-f]{64}", key) or not (_is_plain(name) and _is_plain(kernel)) or entry.is_symlink():
            raise ValueError(f"{entry}: not an entry of a kernel cache")
        files = sorted(entry.iterdir())
        if not files or any(file.is_symlink() or not file.is_file() for file in files):
            raise ValueError(f"{entry}: not a folder of plain files")
        return Entry(key, kernel, {file.name: file.read_bytes() for file in files})


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"\w+", name) is not None


def install(entry: Entry) -> None:
    """Copy an entry into Triton's cache."""
    from triton.runtime.cache import get_cache_manager

    manager = get_cache_manager(entry.key)
    files = {name: manager.put(content, name) for name, content in entry.files.items()}
    manager.put_group(f"{entry.kernel[:150]}.json", files)
