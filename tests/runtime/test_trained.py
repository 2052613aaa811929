"""Trained tensors of a method: read, checked, kept in the program and its files, and held to by recipes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from rewriting import assert_equal_outputs, captured, run
from safetensors.torch import save_file
from torch import Tensor
from zoo import FAMILIES

import tamis
from tamis.errors import BadParameter
from tamis.passes import TokenReduction, keep_plan
from tamis.recipe_errors import RecipeInvalid
from tamis.registry import _REGISTRY
from tamis.rewrite import Pipeline
from tamis.weight_errors import WeightsChanged, WeightsMismatch, WeightsUnreadable
from tamis.weights import TrainedPass, Weights

FAMILY = FAMILIES["vit_mean"]
TENSORS = {"scorer.weight": torch.linspace(-1, 1, 96)}


@dataclass(frozen=True)
class Directed(TrainedPass, TokenReduction):
    """Keep the tokens that lie farthest in a trained direction."""

    def expected(self, layers: Any, width: int) -> dict[str, tuple[int | None, ...]]:
        return {"scorer.weight": (width,)}

    def plan(self, tokens: tamis.Tokens) -> tamis.Plan:
        return keep_plan(tokens, tokens.hidden.float() @ tokens.weights["scorer.weight"])


@pytest.fixture(autouse=True)
def directed() -> Iterator[None]:
    tamis.register("directed")(Directed)
    yield
    del _REGISTRY["directed"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    save_file(TENSORS, tmp_path / "scorer.safetensors")
    return "scorer.safetensors"


def compiled(passes: Any) -> tamis.CompiledModel:
    args, _ = FAMILY.inputs(2)
    return tamis.compile(FAMILY.shared(torch.float32), args, passes=passes, verify=False)


def expected_outputs(images: Tensor) -> Tensor:
    """The model with 10 tokens fewer from its second block's MLP on, by hand."""
    model: Any = FAMILY.shared(torch.float32)
    x = model.blocks[0](model.norm_pre(model._pos_embed(model.patch_embed(images))))
    x = x + model.blocks[1].attn(model.blocks[1].norm1(x))
    kept = (x[:, 1:] @ TENSORS["scorer.weight"]).argsort(1, descending=True)[:, :26].sort(1).values + 1
    x = torch.cat([x[:, :1], x.gather(1, kept.unsqueeze(-1).expand(-1, -1, 96))], 1)
    x = x + model.blocks[1].mlp(model.blocks[1].norm2(x))
    for block in model.blocks[2:]:
        x = block(x)
    return model.head(model.fc_norm(model.norm(x)[:, 1:].mean(1)))


def test_a_trained_pass_equals_the_forward_by_hand_from_file_and_from_python(file: str) -> None:
    images = FAMILY.inputs(3)[0][0]
    with torch.no_grad():
        answer = expected_outputs(images)
        for passes in (f"directed:weights={file},r=10,layers=[1]", Directed(r=10, layers=[1], weights=TENSORS)):
            assert_equal_outputs([compiled(passes)(images)], [answer], 1e-5)


def test_tensors_are_buffers_of_the_program_and_in_its_files(file: str, tmp_path: Path) -> None:
    fast = compiled(f"directed:weights={file},r=3")  # all layers share one tensor
    own = set(fast.state_dict()) - set(FAMILY.shared(torch.float32).state_dict())
    assert own == {"tamis.directed.scorer.weight"}
    images = FAMILY.inputs(3)[0][0]
    answer = fast(images)
    loaded: Any = tamis.load(fast.save(tmp_path / "fast.pt2"))
    torch.testing.assert_close(loaded.state_dict()["tamis.directed.scorer.weight"], TENSORS["scorer.weight"])
    torch.testing.assert_close(loaded(images), answer)
    model = onnx.load(fast.export(tmp_path / "fast.onnx"))
    assert "tamis.directed.scorer.weight" in {one.name for one in model.graph.initializer}


def test_the_tensors_move_with_the_model() -> None:
    fast = compiled(Directed(r=3, weights=TENSORS))
    assert fast.to("meta").state_dict()["tamis.directed.scorer.weight"].is_meta


def test_passes_with_the_same_tensors_share_them_and_others_have_their_own() -> None:
    other = {"scorer.weight": torch.ones(96)}
    passes = [Directed(r=2, layers=[0], weights=TENSORS), Directed(r=3, layers=[1], weights=dict(TENSORS))]
    graph = captured("vit_mean", torch.float32)
    result = Pipeline.parse(passes).run(graph)
    own = set(result.graph.program.state_dict) - set(graph.program.state_dict)
    assert own == {"tamis.directed.scorer.weight"}
    result = Pipeline.parse([*passes, Directed(r=1, layers=[1], weights=other)]).run(graph)
    own = set(result.graph.program.state_dict) - set(graph.program.state_dict)
    assert own == {"tamis.directed.scorer.weight", "tamis.directed-2.scorer.weight"}
    assert not any(name.startswith("tamis") for name in graph.program.state_dict), "the original was changed"
    assert run(result, FAMILY.inputs(5))[0].isfinite().all()


def test_half_precision_files_are_widened_and_count_by_their_numbers(tmp_path: Path) -> None:
    half = {"scorer.weight": TENSORS["scorer.weight"].bfloat16()}
    save_file(half, tmp_path / "half.safetensors", metadata={"note": "of no account"})
    read = Weights.of(tmp_path / "half.safetensors", "directed")
    assert read.tensors["scorer.weight"].dtype == torch.float32
    assert read.digest == Weights.of({"scorer.weight": half["scorer.weight"].float()}, "directed").digest
    assert read.digest != Weights.of(TENSORS, "directed").digest


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "scorer.weight missing"),
        ({**TENSORS, "more": torch.ones(1)}, "more not asked for"),
        ({"scorer.weight": torch.ones(95)}, "scorer.weight is [95], not [96]"),
        ({"scorer.weight": torch.ones(96, dtype=torch.int64)}, "scorer.weight holds torch.int64"),
    ],
)
def test_tensors_that_do_not_fit(tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(WeightsMismatch) as caught:
        Pipeline.parse(Directed(r=3, weights=tensors)).run(captured("vit_mean"))
    text = str(caught.value)
    assert text.startswith(f"directed: the tensors in tensors@{Weights.of(tensors, '').digest[:12]} do not fit: {said}")
    assert "it needs scorer.weight [96] for a model of 96 channels with layers [0, 1, 2]" in text


def test_files_that_cannot_be_read(file: str, tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="directed: weights must be given, got None"):
        Directed(r=3)
    with pytest.raises(WeightsUnreadable, match=r"directed: weights=none\.safetensors: no such file"):
        Pipeline.parse("directed:weights=none.safetensors,r=3")
    torch.save(TENSORS, tmp_path / "pickled.safetensors")
    with pytest.raises(WeightsUnreadable, match="cannot be read as safetensors"):
        Pipeline.parse("directed:weights=pickled.safetensors,r=3")
    with pytest.raises(BadParameter, match="without brackets"):
        Directed(r=3, weights="a+b.safetensors")


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ([1.0, 2.0], "list"),
        (None, "NoneType"),
        (torch.ones(2) * 1j, "torch.complex64 on cpu"),
        (torch.ones(2, device="meta"), "torch.float32 on meta"),
    ],
)
def test_what_is_no_tensor_of_numbers(value: Any, got: str) -> None:
    said = rf"directed: weights must be tensors of real numbers by name, got scorer\.weight: {got}\."
    with pytest.raises(BadParameter, match=said):
        Directed(r=3, weights={"scorer.weight": value})


def test_sparse_tensors_are_read_as_dense_ones() -> None:
    held = Weights.of({name: tensor.to_sparse() for name, tensor in TENSORS.items()}, "")
    assert held.digest == Weights.of(TENSORS, "").digest


def test_a_recipe_holds_to_the_content_of_the_file(file: str, tmp_path: Path) -> None:
    fast = compiled(f"directed:weights={file},r=3")
    digest = Weights.of(TENSORS, "").digest
    assert fast.recipe.weights == {file: digest}
    fast.recipe.write("recipe.yaml")
    args, _ = FAMILY.inputs(2)
    again = tamis.compile(FAMILY.shared(torch.float32), args, recipe="recipe.yaml", verify=False)
    assert again.recipe == fast.recipe
    save_file({"scorer.weight": torch.ones(96)}, file)
    with pytest.raises(WeightsChanged, match=f"the hash of {file} was {digest[:12]} and is "):
        tamis.compile(FAMILY.shared(torch.float32), args, recipe="recipe.yaml")
    given = tamis.compile(FAMILY.shared(torch.float32), args, recipe="recipe.yaml", passes=fast.recipe.passes)
    assert given.recipe.weights != fast.recipe.weights


def test_a_recipe_of_tensors_from_python_says_that_it_does_not_hold_them() -> None:
    recipe = compiled(Directed(r=3, weights=TENSORS)).recipe
    assert recipe.passes[0].startswith("directed:r=3,weights=tensors@")
    args, _ = FAMILY.inputs(2)
    with pytest.raises(WeightsUnreadable, match="were handed over in Python, and a recipe does not hold them"):
        tamis.compile(FAMILY.shared(torch.float32), args, recipe=recipe)
    with pytest.raises(RecipeInvalid, match="'weights' is a list"):
        tamis.Recipe.from_dict({**recipe.to_dict(), "weights": ["a"]}, "recipe.yaml")
