#!/usr/bin/env python3
"""Write docs/onnx_support.md from a run of the ONNX project's node tests through capture (minutes).

.venv/bin/python scripts/onnx_support.py
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as state

from tamis.capture.onnx import table
from tamis.capture.onnx.conformance import Result, attempt, node_tests

PAGE = Path(__file__).resolve().parent.parent / "docs" / "onnx_support.md"
ENOUGH = 0.97
CPU = "CPUExecutionProvider"
HEAD = """\
# Operators of ONNX files

What can be read as [input](onnx.md). This page is written by `scripts/onnx_support.py` from a run of the ONNX project's
node tests (onnx {onnx}, opset {opset}, torch {torch}), each captured by `torch.export` and compared with the expected
outputs within the test's own tolerances. A test counts for every operator in its model, so functions written out in an
operator count too. Inputs that say sizes or conditions are constants of the capture.

{passed} of {total} tests pass; {typed} of the {failed} others are of types that torch does not have (4-bit and 2-bit
integers, float4, float8e8m0) or of text. The last column leaves those out; under {enough:.0%} it is **bold**.

| operator | tests | passed | of types that are read |
|---|---|---|---|
"""
CONTRIB = """
## Operators of ONNX Runtime

The domain `{domain}` has no node tests. What its fused operators do is held against ONNX Runtime {version} itself,
one node at a time over their attributes and optional inputs, through capture: {there}.

ONNX Runtime has no CPU kernel for these, which are held against the same said with other operators: {missing}.

Weights of few bits (`MatMulNBits`) become floats when a file is read, and are floats in what is written. At its
accuracy level 4 ONNX Runtime rounds the other factor to integers too, which tamis does not. Refused, or carried through
where ONNX Runtime can do it: attention that rotates by itself (`do_rotary` of `Attention`), caches that are quantised
or hold a window, past and present in one buffer whose filling is an input of its own, and rows without padding.
"""


def page(results: Sequence[Result]) -> str:
    """The page's text."""
    failed = [one for one in results if one.reason]
    typed = [one for one in failed if one.no_type]
    text = HEAD.format(
        onnx=onnx.__version__,
        opset=onnx.defs.onnx_opset_version(),
        torch=torch.__version__.split("+")[0],
        passed=len(results) - len(failed),
        total=len(results),
        failed=len(failed),
        typed=len(typed),
        enough=ENOUGH,
    )
    names = sorted(name for domain, name in table.TABLE if not domain)
    text += "".join(row(name, [one for one in results if name in one.operations]) for name in names)
    text += contributed()
    text += "\n## Tests that fail\n\n"
    for one in failed:
        text += f"- `{one.name}`: {one.reason}\n"
    return text


def contributed() -> str:
    """The section on ONNX Runtime's own operators."""
    names = sorted(name for domain, name in table.TABLE if domain == table.CONTRIB)
    found = [(one.provider, one.domain, one.op_name) for one in state.get_all_opkernel_def()]
    kernels = {name for provider, domain, name in found if provider == CPU and domain == table.CONTRIB}
    there, missing = [name for name in names if name in kernels], [name for name in names if name not in kernels]
    text = CONTRIB.format(
        domain=table.CONTRIB, version=onnxruntime.__version__, there=", ".join(there), missing=", ".join(missing)
    )
    return "\n".join(textwrap.fill(line, 120) for line in text.splitlines()) + "\n"


def row(name: str, results: Sequence[Result]) -> str:
    """One operator's line."""
    if not results:
        return f"| {name} | none | | |\n"
    passed = sum(not one.reason for one in results)
    read = sum(not one.no_type for one in results)
    share = passed / read if read else 0.0
    shown = f"{share:.1%}" if share >= ENOUGH else f"**{share:.1%}**"
    return f"| {name} | {len(results)} | {passed} | {shown} |\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page([attempt(case) for case in node_tests()]), encoding="utf-8")
