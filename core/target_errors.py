"""Errors about GPU targets; the rules of `errors` hold."""

from __future__ import annotations

from .errors import TamisError


class KernelNotCompiled(TamisError):
    """Triton's compiler refused a kernel for an architecture."""

    template = (
        "kernel {kernel}: not compiled for {architecture}: {reason}.\n"
        "  hint: compile for another target, or without one: elsewhere the reference of the op is compiled instead."
    )


class KernelInterpreted(TamisError):
    """A kernel was to be compiled in a process that interprets kernels, which Triton decides when they are defined."""

    template = (
        "kernel {kernel}: not compiled for {architecture}: Triton interprets kernels in this process.\n"
        "  hint: unset TRITON_INTERPRET and start Python again."
    )
    exit_code = 2


class ToolMissing(TamisError):
    """A program that reads binaries is not there."""

    template = "{tool}: not found, so {what} cannot be read.\n  hint: {hint}"


class KernelRefuses(TamisError):
    """An op without which a rewrite saves nothing has no kernel for what it is asked to do on a GPU."""

    template = "node {node} ({op}) cannot run on a GPU as a kernel: {reason}.\n  hint: {hint}"
    exit_code = 2
