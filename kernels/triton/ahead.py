"""`compile_launch`: a launch as a binary for a GPU that need not be there.

The kernel is specialised as Triton does it at run time: pointers are taken as aligned to 16 bytes, an int that is 1
becomes a constant, one that 16 divides is known to be, a symbolic size is any int.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

from torch import SymInt, Tensor

from ...target_errors import KernelNotCompiled
from .architecture import Architecture
from .launch import Launch

_TYPES = {
    "torch.float64": "fp64",
    "torch.float32": "fp32",
    "torch.float16": "fp16",
    "torch.bfloat16": "bf16",
    "torch.int64": "i64",
    "torch.int32": "i32",
    "torch.int16": "i16",
    "torch.int8": "i8",
    "torch.uint8": "u8",
    "torch.bool": "i1",
}
_BINARY = {"cuda": "cubin", "hip": "hsaco"}
_TEXTS = {"cuda": ("ttir", "ttgir", "llir", "ptx"), "hip": ("ttir", "ttgir", "llir", "amdgcn")}
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Signature:
    """How a launch specialises its kernel.

    types      by argument name: "*fp16", "i32", "fp32", or "constexpr"
    constants  by argument name, of those that are constexpr
    aligned    names of pointers aligned to, and ints divisible by, 16
    """

    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]

    @staticmethod
    def of(launch: Launch) -> Signature:
        """Of the launch's arguments, in the kernel's order."""
        given = {**launch.arguments, **launch.config.constants}
        types: dict[str, str] = {}
        constants: dict[str, Any] = {}
        aligned = []
        for name in launch.kernel.arg_names:
            value = given[name]
            types[name] = "constexpr" if name in launch.config.constants else _type(value)
            if types[name] == "constexpr":
                constants[name] = value
            elif types[name].startswith("*") or (isinstance(value, int) and value % 16 == 0):
                aligned.append(name)
        return Signature(types, constants, tuple(aligned))


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[str(value.dtype)]}"
    if isinstance(value, SymInt):
        return "i32"
    if value is None or isinstance(value, bool) or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


@dataclass(frozen=True)
class Binary:
    """A compiled launch.

    name       of the kernel, with a hash of all that it was specialised for
    code       cubin or hsaco;  texts: intermediate forms by name (ttir, ttgir, llir, ptx or amdgcn)
    shared     bytes of dynamic shared memory;  warps: per program
    seconds    of CPU time the compilation took (near 0 from Triton's cache)
    """

    name: str
    kernel: str
    architecture: Architecture
    signature: Signature
    code: bytes
    texts: dict[str, str]
    shared: int
    warps: int
    seconds: float

    @property
    def suffix(self) -> str:
        """Of a file that holds the code."""
        return _BINARY[self.architecture.backend]


def compile_launch(launch: Launch, architecture: Architecture) -> Binary:
    """Compile the kernel of a launch for an architecture.  No GPU and no driver are touched.

    Raises:
        KernelNotCompiled: Triton's compiler refuses the kernel for this architecture.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = Signature.of(launch)
    place = {name: (i,) for i, name in enumerate(launch.kernel.arg_names)}
    source = ASTSource(
        fn=launch.kernel,
        signature=signature.types,
        constexprs={place[name]: value for name, value in signature.constants.items()},
        attrs={place[name]: _ALIGNED for name in signature.aligned},
    )
    target = GPUTarget(architecture.backend, architecture.code, architecture.warp)
    start = _cpu_seconds()
    try:
        compiled = triton.compile(source, target=target, options=launch.config.options)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise KernelNotCompiled(kernel=launch.name, architecture=architecture.name, reason=reason) from error
    return Binary(
        name=f"{launch.name}_{_digest(launch, signature, architecture)}",
        kernel=launch.name,
        architecture=architecture,
        signature=signature,
        code=compiled.asm[_BINARY[architecture.backend]],
        texts={name: compiled.asm[name] for name in _TEXTS[architecture.backend] if name in compiled.asm},
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        seconds=_cpu_seconds() - start,
    )


def _digest(launch: Launch, signature: Signature, architecture: Architecture) -> str:
    text = f"{signature}{launch.config.options}{architecture.name}{launch.kernel.cache_key}"
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _cpu_seconds() -> float:
    """Of this process and of the assemblers it has run."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
