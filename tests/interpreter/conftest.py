"""Tests that run kernels on CPU tensors.

Triton decides when a kernel is defined whether it will be interpreted, so these run in processes of their own with
TRITON_INTERPRET=1 (tests/kernels/test_interpreter.py starts them) and are not collected elsewhere.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def _read_sizes_as_newer_versions_do() -> None:
    """Triton 3.6's interpreter calls int() on arrays of one element, which NumPy 2.4 refuses; 3.9 squeezes them."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


if version("triton").startswith("3.6."):
    _read_sizes_as_newer_versions_do()
