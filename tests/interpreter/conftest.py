"""Tests that run kernels on CPU tensors.

Triton decides when a kernel is defined whether it will be interpreted, so these run in processes of their own with
TRITON_INTERPRET=1 (tests/kernels/test_interpreter.py starts them) and are not collected elsewhere.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
