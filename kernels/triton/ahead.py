"""`compile_launch`: a launch as a binary for a GPU that need not be there.

The kernel is specialised as Triton does it at run time, so that the binary is the one it looks for there: pointers are
aligned to 16 bytes, an int that is 1 becomes a constant, one that 16 divides is known to be divisible.  A count that
differs from call to call must be a `do_not_specialize` argument of its kernel, or each value that 16 divides would ask
for a binary of its own; strides that are multiples of a known width are specialised, since loads are wider then.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import SymInt, Tensor

from ...error_text import first_line
from ...target_errors import KernelInterpreted, KernelNotCompiled
from .architecture import Architecture
from .launch import Launch

_BINARY = {"cuda": "cubin", "hip": "hsaco"}


@dataclass(frozen=True)
class Signature:
    """How a launch specialises its kernel.

    types      by argument name: "*fp16", "i32", "fp32", or "constexpr"
    constants  by argument name, of those that are constexpr
    aligned    names of pointers aligned to, and ints divisible by, 16
    source     what Triton compiles
    """

    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    source: Any = field(repr=False, compare=False)

    @staticmethod
    def of(launch: Launch, architecture: Architecture) -> Signature:
        """Of the launch's arguments, by Triton's own rules: its binder is asked, with a stand-in for each argument.

        Raises:
            KernelInterpreted: the kernel is no code that can be compiled.
        """
        if launch.interpreted:
            raise KernelInterpreted(kernel=launch.name, architecture=architecture.name)
        from triton.compiler import ASTSource
        from triton.compiler.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        kernel, backend = launch.kernel, make_backend(gpu_target(architecture))
        stand_ins = {name: _stand_in(value) for name, value in launch.arguments.items()}
        keywords = {**stand_ins, **launch.config.constants, **launch.config.options}
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(**keywords)
        keywords = {**launch.config.options, "debug": False}
        _, types, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
        names = kernel.arg_names
        return Signature(
            types,
            {names[place]: value for (place,), value in constants.items()},
            tuple(names[place] for (place,), found in attributes.items() if found),
            ASTSource(kernel, types, constants, attributes),
        )


@dataclass(frozen=True)
class _Pointer:
    """A tensor as far as Triton's binder looks: its type, and an address that 16 divides."""

    dtype: Any

    def data_ptr(self) -> int:
        return 0


def _stand_in(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Pointer(value.dtype)
    if isinstance(value, SymInt):  # 16 divides the symbol's every multiple of 16, and else nothing is known
        return 48 if value.node.expr % 16 == 0 else 17
    return value


def gpu_target(architecture: Architecture) -> Any:
    """The architecture as Triton names it."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget(architecture.backend, architecture.code, architecture.warp)


@dataclass(frozen=True)
class Binary:
    """A compiled launch.

    name       of the kernel, with a hash of all that it was specialised for
    key        under which Triton's cache knows it
    files      of that cache entry, by name: the code, intermediate forms, metadata
    shared     bytes of dynamic shared memory;  warps: per program
    seconds    of CPU time the compilation took (near 0 from Triton's cache)
    """

    name: str
    kernel: str
    architecture: Architecture
    signature: Signature
    key: str
    files: dict[str, bytes]
    shared: int
    warps: int
    seconds: float

    @property
    def code(self) -> bytes:
        """The cubin or hsaco."""
        return self._form(_BINARY[self.architecture.backend])

    def text(self, form: str) -> str:
        """An intermediate form: ttir, ttgir, llir, ptx or amdgcn."""
        return self._form(form).decode()

    def _form(self, suffix: str) -> bytes:
        return next(content for name, content in self.files.items() if name.endswith(f".{suffix}"))


def compile_launch(launch: Launch, architecture: Architecture) -> Binary:
    """Compile the kernel of a launch for an architecture.  No GPU and no driver are touched.

    Raises:
        KernelNotCompiled: Triton's compiler refuses the kernel for this architecture.
        KernelInterpreted: see `Signature.of`.
    """
    import triton

    signature = Signature.of(launch, architecture)
    start = _cpu_seconds()
    try:
        compiled = triton.compile(signature.source, target=gpu_target(architecture), options=launch.config.options)
    except Exception as error:
        names = {"kernel": launch.name, "architecture": architecture.name}
        raise KernelNotCompiled(**names, reason=first_line(error)) from error
    return Binary(
        name=f"{launch.name}_{_digest(launch, signature, architecture)}",
        kernel=launch.name,
        architecture=architecture,
        signature=signature,
        key=compiled.hash,
        files=_cache_entry(compiled.hash, f"{launch.name[:150]}.json"),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        seconds=_cpu_seconds() - start,
    )


def _cache_entry(key: str, group: str) -> dict[str, bytes]:
    from triton.runtime.cache import get_cache_manager

    return {name: Path(path).read_bytes() for name, path in get_cache_manager(key).get_group(group).items()}


def _digest(launch: Launch, signature: Signature, architecture: Architecture) -> str:
    text = f"{signature}{launch.config.options}{architecture.name}{launch.kernel.cache_key}"
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _cpu_seconds() -> float:
    """Of this process and of the assemblers it has run."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
