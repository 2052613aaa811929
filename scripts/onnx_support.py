#!/usr/bin/env python3
"""Write docs/onnx_support.md from a run of the ONNX project's node tests through capture (minutes).

.venv/bin/python scripts/onnx_support.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import torch

from tamis.capture.onnx import table
from tamis.capture.onnx.conformance import Result, attempt, node_tests

PAGE = Path(__file__).resolve().parent.parent / "docs" / "onnx_support.md"
ENOUGH = 0.97
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
    contrib = sorted(name for domain, name in table.TABLE if domain == table.CONTRIB)
    text += f"\nOf the domain `{table.CONTRIB}`, without node tests: {', '.join(contrib)}.\n"
    text += "\n## Tests that fail\n\n"
    for one in failed:
        text += f"- `{one.name}`: {one.reason}\n"
    return text


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
