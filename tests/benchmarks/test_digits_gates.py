"""A-ViT's gates for the digits ViT: training that repeats itself, and what the committed ones are worth."""

from __future__ import annotations

import torch
from digits.gates import halted, train
from digits.model import trained
from digits.parts import PARTS
from digits.scenes import scenes
from safetensors.torch import load_file

from tamis.capture import capture
from tamis.passes import AViT
from tamis.rewrite import Pipeline


def test_training_moves_the_gates_and_repeats_itself() -> None:
    runs = [[step[0]["gate.weight"].clone() for step in train(trained(), steps=2, batch=2)] for _ in range(2)]
    for one, again in zip(*runs, strict=True):
        assert torch.equal(one, again)
    assert not torch.equal(runs[0][0], runs[0][1])
    assert runs[0][1].shape == (5, 96)


@torch.no_grad()
def test_the_committed_gates_stop_most_tokens_and_keep_the_answers() -> None:
    model, gates = trained(), load_file(PARTS["avit"])
    images, labels = scenes("held_out", 7, range(40))
    graph = capture(model, (images[:2],))
    logits, shares = halted(model, images, gates["gate.weight"], gates["gate.bias"])
    assert shares[1:].max() < 0.3
    got = Pipeline.parse([AViT(weights=str(PARTS["avit"]))]).run(graph).graph.program.module()(images)
    torch.testing.assert_close(got, logits, rtol=1e-3, atol=1e-3)  # what was trained is what the pass computes
    halved = (
        Pipeline.parse([AViT(weights=str(PARTS["avit"]), keep_ratio=0.7)]).run(graph).graph.program.module()(images)
    )
    control = Pipeline.parse(f"random:keep_ratio=0.7,layers={list(range(6))}".replace(" ", "")).run(graph)
    right = [
        int((x.argmax(1) == labels).sum()) for x in (halved, control.graph.program.module()(images), model(images))
    ]
    assert right[0] >= right[2] - 2, right
    assert right[0] > right[1] + 5, right
