"""`Opaque`: a node of an ONNX file that tamis has no operation for, carried through a graph as it stands.

In the graph it is `tamis::onnx_node(inputs, text)`; the text holds everything about it, so that graphs can be saved.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

OP = "onnx_node"
SHOWN = 5  # nodes of one operator that an error names


@dataclass(frozen=True)
class Size:
    """A size that follows from those of an input: (times * n + plus) // over, n the product of some of its sizes.

    place        which input;  first, end  its axes that are multiplied, `end` not included
    """

    place: int
    first: int
    end: int
    times: int = 1
    plus: int = 0
    over: int = 1

    def of(self, shapes: Sequence[Sequence[Any]]) -> Any:
        """The size, of the shapes of the inputs: integers or symbols."""
        value = self.times * math.prod(shapes[self.place][self.first : self.end]) + self.plus
        return value if self.over == 1 else value // self.over


@dataclass(frozen=True)
class Result:
    """One output.

    dtype  as torch calls it, without "torch."
    sizes  a number, a `Size`, or a text for one that depends on data; equal texts are equal sizes
    """

    dtype: str
    sizes: tuple[int | Size | str, ...]


@dataclass(frozen=True)
class Opaque:
    """A node carried through.

    op       domain and operator: `com.microsoft.CDist`, `Unique`
    node     what the file calls the node
    model    an ONNX model of this node alone, serialised: tensors it is given are inputs, its constants initializers;
             names are those of the file
    results  its outputs, in the order of the model's
    """

    op: str
    node: str
    model: bytes
    results: tuple[Result, ...]

    @property
    def text(self) -> str:
        """Everything as JSON, which `from_text` reads."""
        return json.dumps({**asdict(self), "model": base64.b64encode(self.model).decode()}, separators=(",", ":"))

    @staticmethod
    def from_text(text: str) -> Opaque:
        """What `text` was made of; raises ValueError, KeyError or TypeError for another text."""
        fields = json.loads(text)
        results = [
            Result(one["dtype"], tuple(Size(**size) if isinstance(size, dict) else size for size in one["sizes"]))
            for one in fields["results"]
        ]
        return Opaque(fields["op"], fields["node"], base64.b64decode(fields["model"]), tuple(results))


def opaque_of(node: fx.Node) -> Opaque | None:
    """The ONNX node that a node of a graph carries, or None."""
    schema = getattr(node.target, "_schema", None)
    return Opaque.from_text(str(node.args[1])) if getattr(schema, "name", "") == f"tamis::{OP}" else None


def carried_in(graph: fx.Graph) -> str:
    """The nodes that a graph carries, as `listed`; "" where it carries none."""
    return listed((one.op, one.node) for one in map(opaque_of, graph.nodes) if one is not None)


def listed(nodes: Iterable[tuple[str, str]]) -> str:
    """Pairs of operator and node as text: `Unique at u; com.microsoft.CDist at first, second`."""
    by_op: dict[str, list[str]] = {}
    for op, node in nodes:
        by_op.setdefault(op, []).append(node)
    return "; ".join(f"{op} at {_some(names)}" for op, names in sorted(by_op.items()))


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
