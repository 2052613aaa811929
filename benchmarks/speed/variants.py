"""Dense, reduced and slice oracle of a timm ViT, in every back end, and the ONNX files of all three."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import timm
import torch
from torch import Tensor, nn

import tamis

BACKENDS = ("eager", "inductor", "onnxruntime")
VARIANTS = ("dense", "reduced", "slice")
Call = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Case:
    """A model of timm, the recipe that reduces it, and the side of its images in pixels."""

    model: str
    recipe: str
    side: int


CASES = {
    "vit_small_224": Case("vit_small_patch16_224", "tome:r=13", 224),
    "vit_small_384": Case("vit_small_patch16_384", "tome:r=38", 384),
    "vit_base_384": Case("vit_base_patch16_384", "tome:r=45", 384),
}


class SliceOracle(nn.Module):
    """The model with the same token counts after every attention, by a view: reduction for free.

    forward(x, *lengths): the counts are those it was made with or, where lengths (tensors [n, 0]) are given, their n.
    """

    def __init__(self, model: Any, counts: list[int]) -> None:
        super().__init__()
        self.model, self.counts = model, counts

    def forward(self, x: Tensor, *lengths: Tensor) -> Tensor:
        """Logits [B, classes]."""
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        counts = [one.shape[0] for one in lengths] if lengths else self.counts
        for block, count in zip(model.blocks, counts, strict=True):
            x = x + block.ls1(block.attn(block.norm1(x)))
            x = x[:, :count]
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return model.forward_head(model.norm(x))


class Models:
    """The three models of one case, with random weights (seed 0)."""

    def __init__(self, case: Case, mode: str | None = None) -> None:
        torch.manual_seed(0)  # noqa: TID251 - timm draws weights from the global generator
        self.dense = timm.create_model(case.model).eval()
        self.example = torch.randn(2, 3, case.side, case.side)
        self.reduced = tamis.compile(self.dense, (self.example,), passes=case.recipe, mode=mode, verify=False)
        report = self.reduced.report
        self.ideal = report.flops_before / report.flops_after
        self.slice = SliceOracle(self.dense, [layer.tokens_out for layer in report.layers])


def calls(case: Case, backend: str, files: Path) -> tuple[Models, dict[str, Call]]:
    """The models, and the three variants as callables; those of ONNX Runtime run the files in the folder `files`."""
    if backend == "onnxruntime":
        return Models(case), {name: onnx_session(files / f"{name}.onnx") for name in VARIANTS}
    models = Models(case, "default" if backend == "inductor" else None)
    if backend == "eager":
        return models, {"dense": models.dense, "reduced": models.reduced, "slice": models.slice}
    # counts as symbols, as in what tamis compiles: constants would give every layer kernels of its own
    lengths = [torch.empty(count, 0) for count in models.slice.counts]
    for one in lengths:
        torch._dynamo.mark_dynamic(one, 0)
    dense, sliced = torch.compile(models.dense), torch.compile(models.slice)
    return models, {"dense": dense, "reduced": models.reduced, "slice": lambda x: sliced(x, *lengths)}


def onnx_session(path: Path) -> Call:
    """A file in ONNX Runtime on one CPU thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def write_files(case: Case, folder: Path) -> dict[str, dict[str, int]]:
    """Write dense.onnx, reduced.onnx and slice.onnx for any batch; -> how many nodes each has, by way of counting."""
    models = Models(case)
    models.reduced.export(folder / "reduced.onnx", check=False)
    models.reduced.export(folder / "inlined.onnx", check=False, inline=True)
    dynamic = {"x": {0: torch.export.Dim("batch")}}
    for name, model in {"dense": models.dense, "slice": models.slice}.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                Batched(model), (models.example,), dynamo=True, dynamic_shapes=dynamic, opset_version=18, verbose=False
            )
        exported.save(folder / f"{name}.onnx")
    return {name: count_nodes(folder / f"{name}.onnx") for name in (*VARIANTS, "inlined")}


class Batched(nn.Module):
    """A model with one argument called x."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """What the model answers."""
        return self.model(x)


def count_nodes(path: Path) -> dict[str, int]:
    """Nodes of an ONNX file: `graph` of its main graph, `stored` with every function's body once."""
    model = onnx.load(path, load_external_data=False)
    graph = len(model.graph.node)
    return {"graph": graph, "stored": graph + sum(len(function.node) for function in model.functions)}
