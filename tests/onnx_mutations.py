"""Small ONNX models, and damage done to them by a seed: to their bytes, or to what they say.

What a seed does depends on the version of onnx: one sort of damage is another operator that it knows.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper

INTERESTING = [0, 1, -1, 2, 3, 7, -7, 64, 255, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63)]


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, ["" if one == "_" else one for one in inputs.split()], outputs.split(), **attributes)


def model(nodes: list[onnx.NodeProto], **weights: Any) -> ModelProto:
    """x [b, n, 4] -> y."""
    tensors = [
        numpy_helper.from_array(np.asarray(one, np.int64 if np.asarray(one).dtype.kind == "i" else np.float32), name)
        if not isinstance(one, np.ndarray)
        else numpy_helper.from_array(one, name)
        for name, one in weights.items()
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in SHAPES.items())
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


SHAPES: dict[str, list[Any] | None] = {"x": ["b", "n", 4], "y": None}
BYTES = np.arange(16, dtype=np.int8).reshape(4, 4)
W = (np.arange(16, dtype=np.float32).reshape(4, 4) - 8) / 8


def models() -> list[ModelProto]:
    """Sizes computed from sizes, attention, integers, branches and loops, slices and windows."""
    shapes = [
        node("Shape", "x", "sizes"),
        node("Gather", "sizes zero", "batch"),
        node("Unsqueeze", "batch first", "one"),
        node("Concat", "one rest", "shape", axis=0),
        node("Reshape", "x shape", "rows"),
        node("Expand", "rows shape", "more"),
        node("Pad", "more pads", "padded"),
        node("Softmax", "padded", "y", axis=-1),
    ]
    attention = [
        node("MatMul", "x w", "q"),
        node("LayerNormalization", "x scale scale", "k", axis=-1),
        node("Transpose", "k", "kt", perm=[0, 2, 1]),
        node("MatMul", "q kt", "s"),
        node("Where", "mask s low", "m"),
        node("Softmax", "m", "p", axis=-1),
        node("MatMul", "p x", "o"),
        node("Add", "o x", "y"),
    ]
    integers = [
        node("QuantizeLinear", "x step zero", "q", axis=0),
        node("DequantizeLinear", "q step zero", "d"),
        node("DequantizeLinear", "wq steps zeros", "w", axis=1),
        node("MatMul", "d w", "m"),
        node("DynamicQuantizeLinear", "m", "u us uz"),
        node("Cast", "u", "y", to=TensorProto.FLOAT),
    ]
    windows = [
        node("Slice", "x starts ends axes", "s"),
        node("Transpose", "s", "t", perm=[0, 2, 1]),
        node("Conv", "t k", "c", pads=[1, 1], strides=[1]),
        node("Split", "c", "l r", axis=1, num_outputs=2),
        node("TopK", "l three", "v i", axis=-1),
        node("GatherElements", "r i", "g", axis=2),
        node("Tile", "g twice", "y"),
    ]
    return [
        model(shapes, zero=0, first=[0], rest=[-1, 4], pads=[0, 0, 1, 0, 0, 1]),
        model(attention, w=W, scale=W[0], mask=np.array(True), low=-1e9),
        model(integers, step=0.1, zero=np.array(3, np.int8), wq=BYTES, steps=W[3] + 2, zeros=BYTES[0] * 0),
        model(loops(), trips=3, yes=np.array(True), axes=[1]),
        own_function(),
        model(
            windows, starts=[0], ends=[9], axes=[1], k=W.reshape(4, 4, 1)[:, :, [0, 0, 0]], three=[3], twice=[1, 2, 1]
        ),
    ]


def loops() -> list[onnx.NodeProto]:
    """A loop and a branch, with graphs of their own."""
    inner = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("a", "c", "e")}
    count, go = (helper.make_tensor_value_info(*one, []) for one in (("i", TensorProto.INT64), ("t", TensorProto.BOOL)))
    out = helper.make_tensor_value_info("t2", TensorProto.BOOL, [])
    body = helper.make_graph(
        [node("Add", "a x", "c"), node("Identity", "t", "t2")], "body", [count, go, inner["a"]], [out, inner["c"]]
    )
    branch = helper.make_graph([node("Mul", "l l", "e")], "then", [], [inner["e"]])
    other = helper.make_graph([node("Neg", "l", "e")], "else", [], [inner["e"]])
    return [
        node("Loop", "trips yes x", "l", body=body),
        node("If", "yes", "f", then_branch=branch, else_branch=other),
        node("ReduceMean", "f axes", "r", keepdims=1),
        node("Einsum", "r f", "y", equation="bij,bkj->bik"),
    ]


def own_function() -> ModelProto:
    """A function of the file's own, called twice with an attribute, and a sparse weight."""
    content = model([node("Own", "x", "a", domain="own", way=-1), node("Own", "a", "b", domain="own", way=1)])
    content.graph.node.append(node("Add", "b sparse", "y"))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    body = [node("Softmax", "i", "s"), node("Constant", "", "c", value_float=0.5), node("Mul", "s c", "o")]
    body[0].attribute.append(helper.make_attribute_ref("axis", AttributeProto.INT, ref_attr_name="way"))
    content.opset_import.append(opsets[1])
    content.functions.append(helper.make_function("own", "Own", ["i"], ["o"], body, opsets, ["way"]))
    indices = numpy_helper.from_array(np.array([1, 3], np.int64), "places")
    sparse = helper.make_sparse_tensor(numpy_helper.from_array(W[0, :2], "sparse"), indices, [1, 4])
    content.graph.sparse_initializer.append(sparse)
    return content


# --- damage -----------------------------------------------------------------------------------------------------------


def damaged(seed: int) -> bytes:
    """The bytes of a model that was damaged in one to four places."""
    chance = random.Random(seed)
    content = chance.choice(models())
    for _ in range(chance.choice([1, 1, 2, 4])):
        with contextlib.suppress(IndexError, ValueError, TypeError, AttributeError):  # there is nothing of the kind
            chance.choice(DAMAGES)(content, chance)
    return damaged_bytes(content.SerializeToString(), chance) if chance.random() < 0.3 else content.SerializeToString()


def damaged_bytes(content: bytes, chance: random.Random) -> bytes:
    """Bytes changed, taken out or put in."""
    changed = bytearray(content)
    place = chance.randrange(len(changed))
    match chance.randrange(4):
        case 0:
            changed[place] = chance.randrange(256)
        case 1:
            changed[place] ^= 1 << chance.randrange(8)
        case 2:
            del changed[place : place + chance.randrange(1, 9)]
        case _:
            changed[place:place] = chance.randbytes(chance.randrange(1, 5))
    return bytes(changed)


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for one in graph.node:
        for attribute in one.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def every_node(content: ModelProto) -> list[onnx.NodeProto]:
    """Those of the graph, of graphs inside, and of functions."""
    own = [one for function in content.functions for one in function.node]
    return own + [one for graph in graphs(content.graph) for one in graph.node]


def some_node(content: ModelProto, chance: random.Random) -> onnx.NodeProto:
    return chance.choice(every_node(content))


def some_name(content: ModelProto, chance: random.Random) -> str:
    names = [name for one in every_node(content) for name in (*one.input, *one.output)]
    return chance.choice([*names, "", "x", "nowhere"])


def rewire(content: ModelProto, chance: random.Random) -> None:
    one = some_node(content, chance)
    one.input[chance.randrange(len(one.input))] = some_name(content, chance)


def swap_inputs(content: ModelProto, chance: random.Random) -> None:
    one = some_node(content, chance)
    i, j = chance.sample(range(len(one.input)), 2)
    one.input[i], one.input[j] = one.input[j], one.input[i]


def change_arity(content: ModelProto, chance: random.Random) -> None:
    one = some_node(content, chance)
    side = chance.choice([one.input, one.output])
    if chance.random() < 0.5:
        side.append(some_name(content, chance))
    else:
        side.pop()


def change_operator(content: ModelProto, chance: random.Random) -> None:
    names = sorted({schema.name for schema in onnx.defs.get_all_schemas()})
    some_node(content, chance).op_type = chance.choice(names)


def change_domain(content: ModelProto, chance: random.Random) -> None:
    some_node(content, chance).domain = chance.choice(["", "ai.onnx", "com.microsoft", "ai.onnx.ml", "own"])


def change_attribute(content: ModelProto, chance: random.Random) -> None:
    one = chance.choice([found for found in every_node(content) if found.attribute])
    attribute = chance.choice(one.attribute)
    value = chance.choice(INTERESTING)
    match chance.randrange(5):
        case 0:
            attribute.name = chance.choice(["axis", "axes", "perm", "to", "keepdims", "pads", "value", "own"])
        case 1:
            attribute.type = chance.randrange(15)  # type: ignore[assignment]
        case 2:
            one.attribute.remove(attribute)
        case 3 if attribute.ints:
            attribute.ints[chance.randrange(len(attribute.ints))] = value
        case _:
            attribute.CopyFrom(helper.make_attribute(attribute.name, chance.choice([value, [value], 0.5, "text"])))


def change_tensor(content: ModelProto, chance: random.Random) -> None:
    one = chance.choice(content.graph.initializer)
    match chance.randrange(5):
        case 0:
            one.data_type = chance.randrange(27)
        case 1:
            one.dims[chance.randrange(len(one.dims))] = chance.choice(INTERESTING)
        case 2:
            one.dims.append(chance.choice(INTERESTING))
        case 3:
            one.raw_data = one.raw_data[: chance.randrange(len(one.raw_data))]
        case _:  # another value of the same size: a shape, an axis, a count
            width = onnx.helper.tensor_dtype_to_np_dtype(one.data_type).itemsize
            place = chance.randrange(len(one.raw_data) // width) * width
            number = (chance.choice(INTERESTING) % 2 ** (8 * width)).to_bytes(width, "little")
            one.raw_data = one.raw_data[:place] + number + one.raw_data[place + width :]


def change_input(content: ModelProto, chance: random.Random) -> None:
    what = content.graph.input[0].type.tensor_type
    match chance.randrange(3):
        case 0:
            what.elem_type = chance.randrange(27)
        case 1:
            what.shape.dim[chance.randrange(3)].dim_value = chance.choice([0, 1, -1, 2, 5, 300])
        case _:
            what.shape.dim.pop()


def move_node(content: ModelProto, chance: random.Random) -> None:
    nodes = content.graph.node
    one = nodes.pop(chance.randrange(len(nodes)))
    if chance.random() < 0.7:
        nodes.insert(chance.randrange(len(nodes) + 1), one)


def change_version(content: ModelProto, chance: random.Random) -> None:
    content.opset_import[0].version = chance.choice([1, 5, 7, 9, 11, 13, 17, 21, 23, 24, 99, -1])


DAMAGES: list[Callable[[ModelProto, random.Random], None]] = [
    *[rewire, swap_inputs, change_arity, change_operator, change_operator, change_domain, change_attribute],
    *[change_attribute, change_tensor, change_tensor, change_input, move_node, change_version],
]
