"""Kernels beside an artifact: written for a named architecture, and given to Triton on a machine that has one.

A binary is native code, so it is used only where the caller trusts the artifact; and only where Triton would have made
the same one: same version, same architecture.  Otherwise Triton compiles the kernels again when they are first called.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ..errors import UnknownTarget
from ..lowering.cross_compile import FOLDER, LIST, CrossCompiled, cross_compile
from .files import check_file, staged

log = logging.getLogger(__name__)


def write_kernels(program: ExportedProgram, directory: Path, architecture: str | None) -> CrossCompiled:
    """See `CompiledModel.write_kernels`; written whole or not at all."""
    if architecture is None:
        raise UnknownTarget(text="without an architecture")
    for name in (FOLDER, LIST):
        check_file(directory / name, overwrite=False)
    compiled = cross_compile(program, architecture)
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

    listed = json.loads((folder / LIST).read_text(encoding="utf-8"))
    made_by, made_for = listed["versions"]["triton"], listed["architecture"]
    if made_for != architecture:
        return f"made for {made_for}, and this is {architecture}: compiled again when first called"
    if made_by != triton.__version__:
        return f"made by Triton {made_by}, and this is {triton.__version__}: compiled again when first called"
    for one in listed["kernels"]:
        install(folder / FOLDER / one["name"], one["cache_key"], one["kernel"])
    return f"{len(listed['kernels'])} in use, made for {made_for} by Triton {made_by}"


def install(entry: Path, key: str, kernel: str) -> None:
    """Copy one folder of files into Triton's cache as the entry `key` of a kernel.

    Raises:
        ValueError: the key is no hash, or the entry holds a link.
    """
    from triton.runtime.cache import get_cache_manager

    if not re.fullmatch(r"[0-9a-f]{64}", key) or entry.is_symlink():
        raise ValueError(f"{entry}: not an entry of a kernel cache")
    manager, files = get_cache_manager(key), {}
    for file in sorted(entry.iterdir()):
        if file.is_symlink() or not file.is_file():
            raise ValueError(f"{file}: not a plain file")
        files[file.name] = manager.put(file.read_bytes(), file.name)
    manager.put_group(f"{kernel[:150]}.json", files)
