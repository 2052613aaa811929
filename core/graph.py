"""`TokenGraph`: an exported program and what analysis knows of its tokens.

Nodes are referred to by name: names survive copies, printing and serialisation, node objects do not.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .opaque import opaque_of

if TYPE_CHECKING:
    from torch import fx
    from torch.export import ExportedProgram

LONG = 80  # characters of a text argument that is shown
RECIPE = "tamis.recipe"  # under this key an ONNX file's metadata hold the recipe that made it


@dataclass(frozen=True)
class Mask:
    """What a site's mask does, found by evaluating the nodes that build it at several lengths and paddings.

    kind  "full"    every key is seen (the mask is then removed from the canonical form),
          "padding" keys that hold padding are hidden, the same for every query,
          "causal"  later keys are hidden,
          "window"  keys farther away than `window` are hidden: a token sees so many tokens before it and after it
                    (None: to the end), in positions of the original sequence,
          "bias"    anything else: added to the logits as it stands, both its last axes being token axes
    node  name of the mask's node, None when there is none
    real  name of a node [B, N] that is nonzero at the tokens whose keys `node` does not hide as padding; None where no
          such node is among those that make the mask
    additive  float mask (0 and a large negative number, or a bias) rather than boolean
    padded    whether it hides keys that hold padding too, whatever its kind
    causal    whether no query sees a later key, whatever its kind
    """

    kind: str = "full"
    node: str | None = None
    real: str | None = None
    additive: bool = False
    padded: bool = False
    causal: bool = False
    window: tuple[int | None, int | None] | None = None

    @property
    def padding_node(self) -> str:
        """Name of the node that says which tokens are real, the cheaper one where there are two; "" without any."""
        return self.real or self.node or ""


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding of queries or keys.

    before  node name of what is rotated; `axes` are that node's axes of batch, heads, tokens and channels
    tables  the tables that rotate it: node name, and its axes of batch and tokens counted from the end (-4, -2); ()
            where they have no row for each token, so that nothing can be rotated to another position
    """

    before: str
    axes: tuple[int, ...] = (0, 1, 2, 3)
    tables: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class Site:
    """One attention site.  q, k, v are node names of [B, H, N, D] tensors.

    q_rotation, k_rotation  rotary position embedding of queries and keys; None where nothing rotates them
    role  "stream" self-attention over the token stream, "pool" few queries that are not tokens read the stream,
          "cross" keys from elsewhere, "other" not on the stream
    cached  whether keys and values of earlier tokens, which the model is given, stand before those of its own
    """

    index: int
    node: str
    q: str
    k: str
    v: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    causal: bool
    mask: Mask
    role: str
    module: str  # path of the module in the user's model
    source: str  # "file:line" in the user's model, "" when unknown
    reason: str = ""  # why the role is not "stream"
    softcap: float | None = None  # logits x are softcap * tanh(x / softcap) before the mask is added
    q_rotation: Rotation | None = None
    k_rotation: Rotation | None = None
    cached: bool = False

    @property
    def hides_later(self) -> bool:
        """Whether no token sees a later one, by a flag or by the mask."""
        return self.causal or self.mask.causal


@dataclass(frozen=True)
class Layer:
    """One transformer layer of the stream: its site and its cut points (node names; None: there is no such place).

    A cut is a node whose value is the whole state of the stream [B, N, C]: replacing it reduces everything after.
    """

    index: int
    site: int
    before_attention: str | None
    after_attention: str | None
    after_block: str | None
    notes: tuple[str, ...] = ()  # why a cut is missing

    def cut(self, where: str) -> str | None:
        """Node name of the cut `where`."""
        return {
            "before_attention": self.before_attention,
            "after_attention": self.after_attention,
            "after_block": self.after_block,
        }[where]


def passes_of(metadata: Mapping[str, str]) -> list[str]:
    """The passes that made an ONNX file, by the recipe that tamis leaves in its metadata; [] without one."""
    try:
        recipe = json.loads(metadata.get(RECIPE, "{}"))
    except ValueError:
        return []
    passes = recipe.get("passes") if isinstance(recipe, dict) else None
    return [str(one) for one in passes] if isinstance(passes, list) else []


@dataclass(frozen=True)
class Interface:
    """How a model's file calls what goes in and out, where that is not what the program calls it.

    inputs, outputs  names in order
    dimensions       per input, (axis, name) of its dynamic dimensions; "" for one without a name
    results          the same per output
    metadata         what the file says of itself: key-value pairs
    weights          the file's name of every weight that the program calls something else
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dimensions: tuple[tuple[tuple[int, str], ...], ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    results: tuple[tuple[tuple[int, str], ...], ...] = ()

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Interface:
        """From what `dataclasses.asdict` made, through JSON or not."""
        dimensions, results = (
            tuple(tuple((axis, name) for axis, name in one) for one in values.get(key, ()))
            for key in ("dimensions", "results")
        )
        metadata, weights = (dict(values.get(key, {})) for key in ("metadata", "weights"))
        return Interface(tuple(values["inputs"]), tuple(values["outputs"]), dimensions, metadata, weights, results)


@dataclass(frozen=True)
class TokenGraph:
    """An exported program in canonical form with its attention sites and token stream.

    program       the torch.export program; its graph is never changed in place
    layers        layers of the stream, in order
    prefix        leading tokens that must stay in place: class, distillation, register tokens
    class_token   whether token 0 is a class token (an input-independent prefix token, or one read by position)
    grid          rows and columns of the patch tokens, where known
    name          what the user called the model
    source_hash   sha256 of the captured graph and of the names and shapes of its weights, for recipes
    interface     names that the model's file gave, None where there is no such file
    """

    program: ExportedProgram
    sites: tuple[Site, ...] = ()
    layers: tuple[Layer, ...] = ()
    prefix: int = 0
    class_token: bool = False
    grid: tuple[int, int] | None = None
    name: str = "model"
    source_hash: str = ""
    interface: Interface | None = None

    @property
    def hides_later(self) -> bool:
        """Whether some attention of the stream is causal."""
        return any(self.sites[layer.site].hides_later for layer in self.layers)

    @property
    def graph(self) -> fx.Graph:
        """The fx graph of the program."""
        return self.program.graph_module.graph

    def node(self, name: str) -> fx.Node:
        """The node called `name`; KeyError if there is none."""
        for node in self.graph.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def with_program(self, program: ExportedProgram) -> TokenGraph:
        """The same graph with another program and nothing known of it yet."""
        return TokenGraph(program, name=self.name, source_hash=self.source_hash, interface=self.interface)

    def with_name(self, name: str) -> TokenGraph:
        """The same graph under another name."""
        return replace(self, name=name)

    def text(self) -> str:
        """The graph as text, one line a node: `%name = op(args) : dtype[shape]`, parameters left out."""
        return "\n".join(self._lines())

    def diff(self, before: TokenGraph) -> str:
        """What changed since `before`, as +/- lines of `text()` without context; "" when nothing did."""
        lines = difflib.unified_diff(list(before._lines()), list(self._lines()), n=0, lineterm="")
        return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))

    def _lines(self) -> Iterator[str]:
        lifted = _lifted_names(self.program)
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name in lifted:
                continue
            yield _line(node, lifted)


def _lifted_names(program: ExportedProgram) -> dict[str, str]:
    signature = program.graph_signature
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }


def _line(node: fx.Node, lifted: dict[str, str]) -> str:
    def show(arg: Any) -> str:
        if isinstance(arg, (list, tuple)):
            return f"[{', '.join(map(show, arg))}]"
        if hasattr(arg, "op") and hasattr(arg, "name"):
            return f"@{lifted[arg.name]}" if arg.name in lifted else f"%{arg.name}"
        return f"{arg[:LONG]}..." if isinstance(arg, str) and len(arg) > LONG else str(arg)

    if node.op == "output":
        return f"return {', '.join(map(show, node.args[0]))}"
    if node.op == "placeholder":
        return f"%{node.name} = input : {shape_text(node.meta.get('val'))}"
    args = [show(a) for a in node.args] + [f"{k}={show(v)}" for k, v in node.kwargs.items()]
    return f"%{node.name} = {op_name(node)}({', '.join(args)}) : {shape_text(node.meta.get('val'))}"


def op_name(node: fx.Node) -> str:
    """`layer_norm`, `tamis.reduce_tokens`, `getitem`: the node's op without overload noise.

    A node carried through from an ONNX file has the file's operator, `com.microsoft.CDist`.
    """
    target, opaque = node.target, opaque_of(node)
    if opaque is not None:
        return opaque.op
    if hasattr(target, "namespace") and hasattr(target, "_schema"):
        name = target._schema.name.split("::")[1]
        return name if target.namespace == "aten" else f"{target.namespace}.{name}"
    return getattr(target, "__name__", str(target))


def shape_text(value: Any) -> str:
    """`f32[s77, 197, 384]`; lists in parentheses; ints as they are."""
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(shape_text, value))})"
    if not hasattr(value, "shape"):
        return str(value)
    dtype = str(value.dtype).removeprefix("torch.").replace("float", "f").replace("int", "i").replace("bi16", "bf16")
    return f"{dtype}[{', '.join(map(str, value.shape))}]"


def source_line(node: fx.Node) -> str:
    """`file:line` of the user's model where the node was made, from its stack trace; "" when unknown."""
    for line in reversed((node.meta.get("stack_trace") or node.stack_trace or "").splitlines()):
        line = line.strip()
        if line.startswith("File ") and "/torch/nn/modules/" not in line:
            path, number = line.split(",")[:2]
            return f"{path[6:-1]}:{number.split()[-1]}"
    return ""


def module_path(node: fx.Node) -> str:
    """Dotted path of the module that made the node; "" at top level."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]).removeprefix("L['self'].").removeprefix("L__self___") if paths else ""
