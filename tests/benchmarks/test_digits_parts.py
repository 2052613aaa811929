"""The trained parts for the digits ViT: training that repeats itself, and files that methods take and gain from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import accuracy
import pytest
import torch
from digits import model, parts, scenes, train_parts
from digits.task import Digits
from reductions import compiled, control_of, methods, parts_of

from tamis.passes import DTEM, DynamicViT, ToMe
from tamis.runtime.api import prepare
from tamis.weights import TrainedPass, Weights

FILES = {name: parts.HERE / f"{name}.safetensors" for name in train_parts.COURSES}


@pytest.mark.parametrize("name", train_parts.COURSES)
def test_training_repeats_itself_and_leaves_the_model_alone(name: str) -> None:
    net = model.trained().requires_grad_(False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    course = train_parts.COURSES[name]
    short = train_parts.Course(course.start, course.loss, course.keep, 2, 2)
    runs = []
    for _ in range(2):
        steps = list(train_parts.train(net, short, 2))
        runs.append(([loss for loss, _ in steps], {key: one.detach().clone() for key, one in steps[-1][1].items()}))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][key]) for key, value in runs[0][1].items())
    start = course.start(torch.Generator().manual_seed(train_parts.SEED))
    assert any(not torch.equal(value, start[key]) for key, value in runs[0][1].items())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_worths_are_shares_that_reach_the_class_token() -> None:
    """Against the product of matrices that attention rollout is defined by."""
    net = model.trained().requires_grad_(False)
    images, _ = scenes.scenes("train", 3, range(2))
    found = train_parts.worths(net, images)
    x, through = net._pos_embed(net.patch_embed(images)), []
    for block in net.blocks:
        through.append((torch.eye(257) + train_parts.attention(block, x).mean(1)) / 2)
        x = block(x)
    rollout = torch.eye(257).expand(2, -1, -1)
    for layer in reversed(range(len(through))):
        rollout = rollout @ through[layer]
        torch.testing.assert_close(found[layer], rollout[:, 0])
    assert found[-1][:, 0].eq(1).all()
    torch.testing.assert_close(found[0].sum(1), torch.ones(2))


def test_attention_is_the_models() -> None:
    net = model.trained().requires_grad_(False)
    x = torch.randn(2, 9, 96, generator=torch.Generator().manual_seed(0))
    block: Any = net.blocks[1]
    mixed = train_parts.attention(block, x) @ train_parts.heads(block, x)[2]
    torch.testing.assert_close(block.attn.proj(mixed.transpose(1, 2).flatten(2)), block.attn(block.norm1(x)))


def test_the_committed_files_are_those_that_the_facts_speak_of() -> None:
    facts = json.loads(parts.FACTS.read_text())
    assert parts.PARTS.keys() >= FILES.keys()
    for name, path in FILES.items():
        assert facts[name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert facts[name]["model"] == hashlib.sha256(model.WEIGHTS.read_bytes()).hexdigest()
        assert path.stat().st_size < 200_000
        start = train_parts.COURSES[name].start(torch.Generator().manual_seed(0))
        assert {key: value.shape for key, value in Weights.of(path, name).tensors.items()} == {
            key: value.shape for key, value in start.items()
        }


def test_trained_methods_beat_what_they_are_held_against() -> None:
    """At 40% of the FLOPs on 100 held-out scenes; the numbers of docs/accuracy.md are on 600."""
    task = Digits(100)
    prepared = prepare(task.model, (task.example(),))
    scorer = DynamicViT(keep_ratio=0.5, weights=FILES["dynamicvit"])
    metric = DTEM(keep_ratio=0.72, weights=FILES["dtem"])
    for method, other in ((scorer, control_of(scorer, 0)), (metric, ToMe(keep_ratio=0.72))):
        own, control = (task.score(compiled(prepared, one))["accuracy"] for one in (method, other))
        gain = own - control
        assert own.mean() > 0.93
        assert gain.mean() > 2 * gain.std(ddof=1) / len(gain) ** 0.5


def test_the_accuracy_table_gets_the_parts_and_says_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parts_of(ToMe, parts.PARTS) == {}
    assert Path(parts_of(DTEM, parts.PARTS)["weights"]).samefile(FILES["dtem"])
    trained = [cls for cls in methods() if issubclass(cls, TrainedPass)]
    assert {DTEM, DynamicViT} <= set(trained)

    class Unscored:
        model = None

        def score(self, *_: Any) -> dict[str, Any]:
            return {"accuracy": torch.ones(1).numpy()}

    class Prepared:
        class graph:
            layers = ()

    found = accuracy.measure(Unscored(), Prepared(), (0,), ["dtem"], {})
    assert found["rows"] == [{"method": "dtem", "refused": found["rows"][0]["refused"]}]
    assert found["rows"][0]["refused"].startswith("dtem: weights must be given, got None")
