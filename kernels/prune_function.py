"""Leave out what an ONNX function computes for outputs nobody uses.

ONNX Runtime inlines functions but runs their dead nodes too (seen in its profile: the log-sum-exp of every attention).
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import FunctionProto


def prune_function(function: FunctionProto, used: Sequence[bool]) -> FunctionProto:
    """The function with only the outputs marked in `used` and the nodes they need; its name says which were kept.

    The same function when all are used.  Inputs and attributes stay, so that calls need no change but their outputs.
    """
    if all(used):
        return function
    kept = [name for name, wanted in zip(function.output, used, strict=True) if wanted]
    needed, nodes = set(kept), []
    for node in reversed(function.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    pruned = FunctionProto()
    pruned.CopyFrom(function)
    pruned.name = f"{function.name}_{''.join(str(i) for i, wanted in enumerate(used) if wanted)}"
    del pruned.output[:], pruned.node[:]
    pruned.output.extend(kept)
    pruned.node.extend(reversed(nodes))
    return pruned
