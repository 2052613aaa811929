"""The ONNX project's own node tests, run through capture for the operations of the table.

Each test is a small model with inputs and outputs, shipped in the onnx package.  One belongs to every operation that is
in its model, so those of an operation include functions written out in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import numpy_helper

from ...errors import TamisError
from ...onnx_errors import TypeUnsupported
from . import backend, table


@dataclass(frozen=True)
class Result:
    """How a test went.

    operations  those of its model
    reason      why it failed; "" where it passed
    no_type     whether it is of a type that torch does not have, or of text
    """

    name: str
    operations: frozenset[str]
    reason: str = ""
    no_type: bool = False


def node_tests() -> Iterator[Any]:
    """The node tests whose operations are all in the table, in the newest opset, in a fixed order."""
    from onnx.backend.test.loader import load_model_tests

    table.fill()
    known = {name for domain, name in table.TABLE if not domain}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of overflows, which are what some tests are about
        cases = load_model_tests(kind="node")
    return (
        case for case in sorted(cases, key=lambda case: case.name) if case.model and operations(case.model) <= known
    )


def operations(model: onnx.ModelProto) -> frozenset[str]:
    """Names of a model's operations, with the domain where it is not the standard one."""
    return frozenset(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in model.graph.node)


def attempt(case: Any) -> Result:
    """Capture a test's model, run it on the test's inputs, and compare within the test's own tolerances."""
    from onnx.backend.test.runner import Runner

    found = operations(case.model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared = backend.prepare(case.model)
            for inputs, outputs in case.data_sets:
                got = prepared.run(_arrays(inputs))
                expected, results = _flat(_arrays(outputs)), _flat(list(got))
                Runner.assert_similar_outputs(expected, results, rtol=case.rtol, atol=case.atol)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if isinstance(error, TamisError) else " ".join(lines[:2])
        no_type = isinstance(error, TypeUnsupported) or "has no form in torch" in reason
        return Result(case.name, found, reason.removeprefix("model.onnx: ")[:160] or type(error).__name__, no_type)
    return Result(case.name, found)


def _flat(values: list[Any]) -> list[Any]:
    """The arrays of lists in lists: the runner compares no sequence whose arrays differ in shape."""
    return [one for value in values for one in (_flat(value) if isinstance(value, list) else [value])]


def _arrays(values: Any) -> list[Any]:
    return [numpy_helper.to_array(one) if isinstance(one, onnx.TensorProto) else one for one in values]
