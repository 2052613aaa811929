"""Operators that tamis has no function for, in files of models: before, after and on the stream of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_exports import exported, inputs_of
from opaque_files import MS, behind, output_of, saved, unknown, weight

import tamis
from tamis.capture import capture
from tamis.errors import ExportFailed, TokenAxisUnsupported
from tamis.onnx_errors import OpaqueInTheWay, OpaqueOnStream
from tamis.runtime.cli import main
from tamis.runtime.compiled import CompiledModel


@dataclass(frozen=True)
class Spliced:
    """A file with unknown operators, and its outputs in order."""

    name: str
    path: Path
    outputs: tuple[str, ...]

    def run(self, batch: int, path: Path | None = None) -> dict[str, torch.Tensor]:
        """What ONNX Runtime answers, for this file or another one."""
        return run_file(path or self.path, inputs_of(self.name, batch, length=8 + batch))

    def agrees(self, call: torch.nn.Module, batch: int, path: Path | None = None) -> None:
        """Assert that a module computes what ONNX Runtime does, for this file or another one."""
        got, want = call(*inputs_of(self.name, batch, length=8 + batch).values()), self.run(batch, path)
        assert list(got) == list(want) == list(self.outputs)
        for name, value in want.items():
            torch.testing.assert_close(
                got[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


def run_file(path: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    results = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return {one.name: torch.from_numpy(x) for one, x in zip(session.get_outputs(), results, strict=True)}


def text(folder: Path) -> Spliced:
    """BERT: upper triangles of the embeddings; distances of the pooled rows to three others."""
    model = onnx.load(exported("bert", "dynamo"))
    behind(model, "embedding", lambda x, y: unknown("Trilu", [x], [y], "before"))
    weight(model, "prototypes", np.random.default_rng(0).standard_normal((3, 32)))
    output_of(model, unknown("CDist", ["pooler_output", "prototypes"], ["distances"], "after", metric="euclidean"), 2)
    outputs = ("last_hidden_state", "pooler_output", "distances")
    return Spliced("bert", saved(model, folder / "bert.onnx"), outputs)


def image(folder: Path) -> Spliced:
    """ViT: upper triangles of the pictures; windows of the last hidden state's tokens; values that are different."""
    model = onnx.load(exported("vit", "dynamo"))
    behind(model, "pixel_values", lambda x, y: unknown("Trilu", [x], [y], "before"))
    output_of(
        model,
        unknown(
            "UnfoldTensor",
            [found(model, "LayerNormalization", -1).output[0]],
            ["windows"],
            "after",
            dim=1,
            size=5,
            step=4,
        ),
        4,
    )
    output_of(model, onnx.helper.make_node("Unique", ["logits"], ["different"], name="set"), 1)
    return Spliced("vit", saved(model, folder / "vit.onnx"), ("logits", "windows", "different"))


MOST = pytest.mark.parametrize("spliced", [pytest.param(text, marks=pytest.mark.full), image], indirect=True)


@pytest.fixture(scope="module", params=[text, image])
def spliced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Spliced:
    """A file with unknown operators before and after the stream."""
    file: Spliced = request.param(tmp_path_factory.mktemp("opaque"))
    return file


@pytest.fixture(scope="module")
def fast(spliced: Spliced) -> CompiledModel:
    """The file with tokens merged."""
    return tamis.compile(str(spliced.path), passes="tome:keep_ratio=0.8")


def test_onnx_knows_no_shapes_for_them(spliced: Spliced) -> None:
    """Else the tests here would prove less than they say."""
    inferred = onnx.shape_inference.infer_shapes(onnx.load(spliced.path), data_prop=True)
    known = {one.name for one in inferred.graph.value_info}
    carried = [node for node in inferred.graph.node if node.domain == MS]
    outputs = {one.name for one in inferred.graph.output}
    assert len(carried) == 2
    assert not {node.output[0] for node in carried} & (known - outputs)


def test_the_callable_computes_what_onnx_runtime_does(spliced: Spliced, fast: CompiledModel) -> None:
    assert fast.original is not None
    assert [site.role for site in fast.original.sites] == ["stream"] * 2
    for batch in (1, 3, 4):
        spliced.agrees(fast.original.program.module(), batch)


def test_tokens_are_merged_and_the_file_is_written(tmp_path: Path, spliced: Spliced, fast: CompiledModel) -> None:
    assert all(row.tokens_out < row.tokens_in for row in fast.report.layers)
    assert "FLOPs (1." in str(fast.report)
    assert "not compared" not in str(fast.report)
    fast.export(tmp_path / "fast.onnx")
    for batch in (1, 3, 4):
        spliced.agrees(fast, batch, tmp_path / "fast.onnx")
    full, less = spliced.run(3), spliced.run(3, tmp_path / "fast.onnx")
    assert {name: x.shape for name, x in less.items()} == {name: x.shape for name, x in full.items()}
    assert not torch.equal(full[spliced.outputs[0]], less[spliced.outputs[0]])


@MOST
def test_nodes_are_written_as_they_were(tmp_path: Path, spliced: Spliced, fast: CompiledModel) -> None:
    fast.export(tmp_path / "fast.onnx")
    before, after = onnx.load(spliced.path), onnx.load(tmp_path / "fast.onnx")
    names = {node.name for node in before.graph.node if node.domain == MS or node.op_type == "Unique"}
    assert len(names) >= 2
    assert nodes(before, names) == nodes(after, names)
    assert {one.domain: one.version for one in after.opset_import} == {"": 18, "tamis": 1, MS: 1}


def nodes(model: onnx.ModelProto, names: set[str]) -> list[onnx.NodeProto]:
    """The nodes of these names, all but the names of what they are connected with."""
    found = []
    for node in model.graph.node:
        if node.name in names:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = ["" if not name else "x" for name in node.input]
            copy.output[:] = ["" if not name else "x" for name in node.output]
            found.append(copy)
    return found


@MOST
def test_a_round_trip_without_a_pass(tmp_path: Path, spliced: Spliced) -> None:
    out = tmp_path / "same.onnx"
    assert main([str(spliced.path), "-o", str(out), "--allow-noop", "--quiet"]) == 0
    for batch in (1, 3):
        want = spliced.run(batch)
        got = spliced.run(batch, out)
        assert list(got) == list(want)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)
    assert "tamis" not in {one.domain for one in onnx.load(out).opset_import}


@MOST
def test_what_is_saved_is_loaded_and_written(tmp_path: Path, spliced: Spliced, fast: CompiledModel) -> None:
    fast.save(tmp_path / "fast.pt2")
    loaded = tamis.load(tmp_path / "fast.pt2")
    loaded.export(tmp_path / "fast.onnx")
    for batch in (1, 4):
        spliced.agrees(loaded, batch, tmp_path / "fast.onnx")


def test_pruning_leaves_none_that_read_every_token(tmp_path: Path) -> None:
    with pytest.raises(TokenAxisUnsupported) as caught:
        tamis.compile(str(image(tmp_path).path), passes="random:keep_ratio=0.5")
    assert ": after:" in str(caught.value)
    assert "node after (com.microsoft.UnfoldTensor) needs every token in its place, but random:keep_ratio=0.5" in str(
        caught.value
    )


# --- on the stream --------------------------------------------------------------------------------------------------


def on_stream(folder: Path, place: str) -> str:
    """ViT with an unknown operator in the first MLP or on the stream behind it, and another one at its end."""
    model = onnx.load(exported("vit", "dynamo"))
    value = found(model, "Gelu", 0).output[0] if place == "mlp" else found(model, "LayerNormalization", 2).input[0]
    behind(model, value, lambda x, y: unknown("Trilu", [x], [y], "between"))
    output_of(model, unknown("CDist", ["logits", "logits"], ["distances"], "after", metric="sqeuclidean"), 2)
    return str(saved(model, folder / "between.onnx"))


def found(model: onnx.ModelProto, op: str, index: int) -> onnx.NodeProto:
    """One of the nodes of an operator."""
    return [node for node in model.graph.node if node.op_type == op][index]


@pytest.mark.parametrize(
    ("place", "passes"),
    [
        ("mlp", "tome:keep_ratio=0.8"),
        ("mlp", "random:keep_ratio=0.5,layers=[0,1]"),
        ("stream", "tome:keep_ratio=0.8"),
    ],
)
def test_between_layers_it_is_an_error_that_lists_all(tmp_path: Path, place: str, passes: str) -> None:
    """In an MLP; or in the stream itself, which it cuts in two."""
    path = on_stream(tmp_path, place)
    with pytest.raises(OpaqueOnStream) as caught:
        tamis.compile(path, passes=passes)
    number, _, rest = str(caught.value).removeprefix(f"{path}: between:").partition(": ")
    assert number.isdigit()
    first, every, hint = rest.split("\n")
    assert first == (
        f"node between (com.microsoft.Trilu) has no form in torch and stands between layers that {passes} reduces, "
        "so no rule says what becomes of its tokens."
    )
    assert (
        every == "  the file's operators without a form: com.microsoft.CDist at after; com.microsoft.Trilu at between"
    )
    assert hint.startswith("  hint: name the layers to reduce, all on one side of it (layers=...), or ")


def test_what_cuts_the_stream_is_named(tmp_path: Path) -> None:
    graph = capture(on_stream(tmp_path, "stream"))
    assert [site.role for site in graph.sites] == ["stream", "other"]
    assert graph.sites[1].reason.endswith(
        "; between them stands what has no form in torch: com.microsoft.Trilu at between"
    )


def test_where_nothing_to_reduce_is_found_they_are_listed(tmp_path: Path) -> None:
    """The softmax of attention, behind which its product with the values is looked for, is one of them."""
    model = onnx.load(exported("vit", "dynamo"))
    for i, node in enumerate(node for node in model.graph.node if node.op_type == "Softmax"):
        behind(model, node.output[0], lambda x, y, i=i: unknown("Trilu", [x], [y], f"hides {i}"))
    path = saved(model, tmp_path / "hidden.onnx")
    with pytest.raises(OpaqueInTheWay) as caught:
        capture(str(path))
    assert "any of which may hide it: com.microsoft.Trilu at hides 0, hides 1\n" in str(caught.value)
    assert main([str(path), "--check"]) == 0


@MOST
def test_no_native_package_holds_them(tmp_path: Path, spliced: Spliced, fast: CompiledModel) -> None:
    with pytest.raises(
        ExportFailed, match="only ONNX Runtime evaluates these operators of the file it was made from: "
    ):
        fast.save(tmp_path / "fast.pt2", native=True)
    assert not list(tmp_path.iterdir())


def test_layers_behind_it_can_be_reduced(tmp_path: Path) -> None:
    path = on_stream(tmp_path, "mlp")
    fast = tamis.compile(path, passes="tome:keep_ratio=0.8,layers=[1]")
    assert [row.tokens_out < row.tokens_in for row in fast.report.layers] == [False, True]
    fast.export(tmp_path / "fast.onnx")
    inputs = inputs_of("vit", 3)
    for name, value in run_file(tmp_path / "fast.onnx", inputs).items():
        torch.testing.assert_close(fast(**inputs)[name], value, rtol=1e-4, atol=1e-4)
