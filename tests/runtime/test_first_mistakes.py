"""What a newcomer does wrong first, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import FAMILIES

import tamis
from tamis.capture.factory import call_factory
from tamis.errors import (
    BadParameter,
    BadPassText,
    CaptureFailed,
    InputMismatch,
    NothingChanged,
    TamisError,
    TargetMissing,
    UnknownOutputFormat,
    UnknownParameter,
    UnknownPass,
    UnknownTarget,
)
from tamis.passes import EViT, ToMe
from tamis.rewrite import Pipeline
from tamis.runtime.compiled import CompiledModel


@pytest.fixture(scope="module")
def fast() -> CompiledModel:
    family = FAMILIES["vit_small"]
    return tamis.compile(family.shared(), family.inputs(2)[0], passes="tome:r=3", verify=False)


def test_another_image_size(fast: CompiledModel) -> None:
    (images,), _ = FAMILIES["vit_small"].inputs(2)
    larger = torch.zeros(2, 3, images.shape[2] + 8, images.shape[3] + 8)
    with pytest.raises(
        InputMismatch, match=r"batch and length apart, got x is \[2, 3, 232, 232\], not f32\[batch, 3, 224"
    ):
        fast(larger)
    with pytest.raises(InputMismatch):
        fast.verify(larger)


def test_the_wrong_suffix(fast: CompiledModel, tmp_path: Path) -> None:
    with pytest.raises(UnknownOutputFormat):
        fast.save(tmp_path / "x.onnx")
    with pytest.raises(UnknownOutputFormat):
        fast.export(tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


def test_reducing_a_reduced_model(fast: CompiledModel) -> None:
    with pytest.raises(NothingChanged, match="was reduced before; put all passes in one recipe"):
        tamis.compile(fast.graph.program, passes="random:r=2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_not_here() -> None:
    family = FAMILIES["vit_small"]
    with pytest.raises(TargetMissing, match="target cuda: this machine has no such device"):
        tamis.compile(family.shared(), family.inputs(2)[0], passes="tome:r=3", target="cuda")


@pytest.mark.parametrize(
    ("passes", "text"),
    [
        ("evit:fuse=maybe", "evit: fuse must be true or false, got 'maybe'"),
        ("random:r=2,seed=0.5", "random: seed must be a whole number, got 0.5"),
        ("tome:r={99:8}", r"tome: layers must be between 0 and \d, got 99"),
    ],
)
def test_parameters_of_the_wrong_kind(passes: str, text: str) -> None:
    family = FAMILIES["vit_small"]
    with pytest.raises(BadParameter, match=text):
        tamis.compile(family.shared(), family.inputs(2)[0], passes=passes)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ToMe(ratio=0.3), "tome: no parameter 'ratio'.\n  hint: write keep_ratio=0.7"),
        (lambda: ToMe(keep_rate=0.3), "tome: no parameter 'keep_rate'.\n  hint: write keep_ratio=0.3"),
        (lambda: EViT(layer=[1]), "evit: no parameter 'layer'; did you mean layers?"),
    ],
)
def test_parameters_in_python(make: Callable[[], object], text: str) -> None:
    with pytest.raises(UnknownParameter) as caught:
        make()
    assert text in str(caught.value)


def test_one_tensor_instead_of_a_tuple(fast: CompiledModel) -> None:
    family = FAMILIES["vit_small"]
    (images,), _ = family.inputs(2)
    bare = tamis.compile(family.shared(), images, passes="tome:r=3", verify=False)
    assert torch.equal(bare(images), fast(images))


def test_no_passes_at_all() -> None:
    family = FAMILIES["vit_small"]
    with pytest.raises(BadParameter, match=r'passes must be given, got none.\n  hint: for example "tome:r=13"'):
        tamis.compile(family.shared(), family.inputs(2)[0])


def test_ids_that_the_vocabulary_does_not_have() -> None:
    """The example is a note (the result may be right all the same), data to verify or time on is an error."""
    family = FAMILIES["bert"]
    args, kwargs = family.inputs(2)
    wrong = {**kwargs, "input_ids": kwargs["input_ids"] + 10**6}
    fast = tamis.compile(family.model(layers=1), args, kwargs=wrong, passes="tome:r=3")
    (note,) = [note for note in fast.report.notes if note.startswith("not compared with the original: ")]
    assert "the original model must run on these inputs, got IndexError" in note
    for ask in (fast.verify, fast.benchmark, fast.run_original):
        with pytest.raises(InputMismatch, match="check token ids against the vocabulary"):
            ask(**wrong)


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        (ToMe, "it is the class, not a pass; write ToMe"),
        ([ToMe], "write ToMe"),
        (5, 'passes: each must be text or the object of a pass, got 5.\n  hint: write "tome:r=13" or'),
        ([1, 2], "object of a pass, got 1"),
        (b"tome:r=1", "object of a pass, got b'tome:r=1'"),
        (torch.zeros(2, 2), "object of a pass, got a Tensor"),
        ({"tome": 3}, "tome: parameters must be a mapping from their names, got 3"),
        ({1: {"r": 1}}, "unknown pass 1"),
        ("tome:r=1 + ", "cannot read the pass '': there is nothing"),
    ],
)
def test_what_is_no_pass(passes: object, said: str) -> None:
    with pytest.raises((BadPassText, BadParameter, UnknownPass), match=said):
        Pipeline.parse(passes)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"kwargs": torch.zeros(2)}, BadParameter, "kwargs must be a mapping from the names of inputs, got a Tensor"),
        ({"kwargs": [torch.zeros(2)]}, BadParameter, "names of inputs, got a list of Tensor"),
        ({"kwargs": "x"}, BadParameter, "got 'x'.\n  hint: write {\"input_ids\": ids}; without names they are args."),
        ({"kwargs": {1: torch.zeros(2)}}, BadParameter, "got a dict"),
        (
            {"kwargs": {"y": torch.zeros(2)}},
            InputMismatch,
            "of forward(x), got args[0], y.\n  hint: forward says: got",
        ),
        ({"args": "x"}, InputMismatch, "small: example inputs must be tensors, got 'x'.\n  hint: convert arrays"),
        ({"args": (None,)}, InputMismatch, "example inputs must be tensors, got None"),
        ({"args": torch.zeros(2, 4, 6).numpy()}, InputMismatch, "example inputs must be tensors, got a ndarray"),
        ({"args": torch.zeros(0, 4, 6)}, InputMismatch, "must have a batch of 1 or more, got [0, 4, 6]"),
        ({"dynamic_shapes": "Auto"}, BadParameter, 'dynamic_shapes must be "auto" or shapes of torch.export, got'),
        ({"dynamic_shapes": 3}, BadParameter, "shapes of torch.export, got 3"),
        ({"dynamic_shapes": {"nope": None}}, CaptureFailed, 'hint: "auto" finds them; else as torch.export.export'),
        ({"target": 3}, UnknownTarget, "unknown target 3.\n  hint: use auto, cpu, cuda"),
        ({"restore": "no"}, BadParameter, "compile: restore must be true or false, got 'no'"),
        ({"verify": torch.zeros(2)}, BadParameter, "compile: verify must be true or false, got a Tensor"),
        ({"recipe": {}}, BadParameter, "compile: recipe must be a Recipe or the path of one, got {}"),
    ],
    ids=lambda one: "-".join(one) if isinstance(one, dict) else "",
)
def test_arguments_of_the_wrong_kind(given: dict[str, Any], error: type[TamisError], said: str) -> None:
    class small(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    with pytest.raises(error) as caught:
        tamis.compile(small().eval(), **{"args": (torch.zeros(2, 4, 6),), "passes": "tome:r=3", **given})
    assert type(caught.value) is error
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("option", "said"),
    [("mode: fast", "mode must be one of default"), ("dense_below: -3", "dense_below must be a number of tokens")],
)
def test_a_wrong_option_of_a_recipe_names_its_file(tmp_path: Path, option: str, said: str) -> None:
    """The call's own names the call, as above."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"passes: [tome:r=3]\noptions: {{{option}}}\n")
    with pytest.raises(BadParameter) as caught:
        tamis.compile(torch.nn.Linear(2, 2), torch.zeros(2, 2), recipe=recipe)
    assert str(caught.value).startswith(f"{recipe}: {said}")


def test_a_path_that_is_none(fast: CompiledModel) -> None:
    calls = {"load": tamis.load, "CompiledModel.export": fast.export, "CompiledModel.save": fast.save}
    for where, call in {**calls, "Recipe.read": tamis.Recipe.read}.items():
        with pytest.raises(BadParameter) as caught:
            call(3)  # type: ignore[operator]
        assert str(caught.value) == f"{where}: path must be text or a Path, got 3.\n  hint: see help(tamis.{where})."


def test_other_arguments_of_a_result(fast: CompiledModel) -> None:
    for repeats in (0, -1, 1.5, None):
        with pytest.raises(BadParameter, match="repeats must be a whole number, 1 or more, got"):
            fast.benchmark(repeats=repeats)  # type: ignore[arg-type]
    with pytest.raises(BadParameter, match="original must be a captured graph, got 3"):
        fast.with_original(3)  # type: ignore[arg-type]
    with pytest.raises(BadParameter, match="graph must be a captured graph, got a CompiledModel"):
        Pipeline.parse("tome:r=1").run(fast)  # type: ignore[arg-type]
    with pytest.raises(UnknownTarget, match="unknown target 3"):
        fast.write_kernels("out", 3)  # type: ignore[arg-type]


def test_a_program_has_its_own_shapes(fast: CompiledModel) -> None:
    with pytest.raises(BadParameter, match="dynamic_shapes must be left out with an exported program, got None"):
        tamis.compile(fast.graph.program, passes="tome:r=3", dynamic_shapes=None)


def test_a_pass_without_its_colon() -> None:
    with pytest.raises(BadPassText, match="a ':' should follow tome"):
        Pipeline.parse("tome r=2")


def test_a_function_that_returns_a_bare_tensor(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import torch\n\ndef one():\n    return torch.nn.Identity(), torch.ones(2, 3)\n")
    _, args, kwargs = call_factory(tmp_path / "mine.py", "one")
    assert [tuple(one.shape) for one in args] == [(2, 3)]
    assert kwargs == {}
