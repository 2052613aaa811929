"""`resources_of`: what a compiled kernel takes of a GPU, read from its binary; no GPU is touched.

NVIDIA binaries are read with the `cuobjdump` that comes with Triton, AMD ones by the notes of their assembly.  Shared
memory is what the launch asks for, which the binary does not say.  On sm_90 and newer matrix products must run on the
tensor cores' asynchronous instructions (HGMMA, UTCMMA); HMMA is the form before them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...target_errors import ToolMissing
from .ahead import Binary

_COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "LDL", "STL", "MUFU")
_MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA")


@dataclass(frozen=True)
class Resources:
    """What one program of a kernel takes.

    registers     32-bit registers per thread
    stack         bytes of local memory per thread: more than 0 means that registers spill
    spills        loads and stores of local memory in the code
    shared        bytes of shared memory
    threads       per program
    instructions  how many of each kind that says something: matrix products, bulk copies, exponentials
    """

    registers: int
    stack: int
    spills: int
    shared: int
    threads: int
    instructions: dict[str, int]

    @property
    def tensor_cores(self) -> str:
        """The matrix instructions used, such as "HGMMA"; "" for none."""
        return ", ".join(name for name in (*_MATRIX, "MFMA") if self.instructions.get(name))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "tensor_cores": self.tensor_cores}


def resources_of(binary: Binary) -> Resources:
    """Read the binary.

    Raises:
        ToolMissing: the installed Triton has no `cuobjdump`.
    """
    return _of_nvidia(binary) if binary.architecture.backend == "cuda" else _of_amd(binary)


def _of_nvidia(binary: Binary) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.code)
        usage = _cuobjdump("--dump-resource-usage", path)
        listing = _cuobjdump("--dump-sass", path)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    kinds = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", listing, re.MULTILINE))
    instructions = {name: kinds[name] for name in _COUNTED if kinds[name]}
    threads = re.search(r"\.reqntid\s+(\d+)", binary.text("ptx"))
    return Resources(
        registers=found["REG"],
        stack=found["STACK"],
        spills=kinds["LDL"] + kinds["STL"],
        shared=binary.shared,
        threads=int(threads[1]) if threads else binary.warps * binary.architecture.warp,
        instructions=instructions,
    )


def _of_amd(binary: Binary) -> Resources:
    text = binary.text("amdgcn")

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    scratch = len(re.findall(r"^\s+scratch_(?:load|store)", text, re.MULTILINE))
    products = len(re.findall(r"^\s+v_mfma_", text, re.MULTILINE))
    return Resources(
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        spills=max(scratch, number("vgpr_spill_count")),
        shared=binary.shared,
        threads=binary.warps * binary.architecture.warp,
        instructions={"MFMA": products} if products else {},
    )


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        hint = "install a Triton that brings it, or the CUDA toolkit."
        raise ToolMissing(tool="cuobjdump", what="what a kernel takes of a GPU", hint=hint)
    return subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout
