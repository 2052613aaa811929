"""The digits: scenes that depend on nothing but their number, sources that are split, training that repeats itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import model, scenes, train

TINY = (train.Stage(7, 1, 4), train.Stage(train.GRID, 1, 2))


def test_scenes_are_the_same_everywhere() -> None:
    images = [scenes.scene(split, 0, index).image for split in ("train", "held_out") for index in range(20)]
    digest = hashlib.sha256(np.stack(images).tobytes()).hexdigest()
    assert digest == "b6ebe5def751b697842885de98be0a342f159ecdd8bfe0279a1f15f1a2ec7db3"


def test_a_scene_depends_on_split_seed_and_index_only() -> None:
    one = scenes.scene("train", 3, 7)
    again = scenes.scene("train", 3, 7)
    assert (one.label, one.box) == (again.label, again.box)
    np.testing.assert_array_equal(one.image, again.image)
    for other in (("held_out", 3, 7), ("train", 4, 7), ("train", 3, 8)):
        assert (scenes.scene(*other).image != one.image).any()
    batch, labels = scenes.scenes("train", 3, [7, 8])
    torch.testing.assert_close(batch[0, 0], (torch.from_numpy(one.image).float() / 64 - 0.5))
    assert labels.tolist() == [one.label, scenes.scene("train", 3, 8).label]


def test_no_source_digit_is_on_both_sides() -> None:
    sides = [{image.tobytes() for image in scenes.sources(split)[0]} for split in ("train", "held_out")]
    assert len(sides[0]) + len(sides[1]) == 1797
    assert not sides[0] & sides[1]
    assert set(scenes.sources("held_out")[1]) == set(range(10))


def test_the_digit_is_the_only_whole_one_and_inside_its_box() -> None:
    low, high = scenes.SIZES
    for index in range(50):
        one = scenes.scene("train", 0, index)
        top, left, side = one.box
        assert low <= side <= high
        assert min(top, left) >= 0
        assert max(top, left) + side <= scenes.CANVAS
        assert one.image[top : top + side, left : left + side].max() > 120


def test_windows_hold_the_digit_and_say_where_it_is() -> None:
    batch = train.Windows((train.Stage(7, 2, 16),))[1]
    assert batch.images.shape == (16, 1, 28, 28)
    for i, index in enumerate(range(16, 32)):
        one = scenes.scene("train", train.SEED, index)
        first = int(batch.patches[i, 0])
        row, column = first // train.GRID * train.PATCH, first % train.GRID * train.PATCH
        top, left, side = one.box
        assert row <= top
        assert column <= left
        assert max(top - row, left - column) + side <= 28
        whole = scenes.as_input(one.image[None])[0, 0]
        torch.testing.assert_close(batch.images[i, 0], whole[row : row + 28, column : column + 28], rtol=0, atol=0)
        on_digit = batch.targets[i] != train.NOTHING
        assert (side // 4 - 1) ** 2 <= on_digit.sum() <= (side // 4 + 1) ** 2
        assert set(batch.targets[i][on_digit].tolist()) == {one.label}


def test_a_window_of_the_whole_canvas_is_the_model_itself() -> None:
    net = model.untrained(torch.Generator().manual_seed(0)).eval()
    batch = train.Windows((train.Stage(train.GRID, 1, 2),))[0]
    with torch.no_grad():
        expected = net.forward_features(batch.images)
        torch.testing.assert_close(train.features(net, batch.images, batch.patches), expected)


def test_heads_start_by_looking_at_their_neighbour() -> None:
    """On an empty canvas, where only positions tell the patches apart."""
    net = model.untrained(torch.Generator().manual_seed(0)).eval()
    block, width = net.blocks[0], model.ARCHITECTURE["embed_dim"]
    with torch.no_grad():
        hidden = block.norm1(net.pos_embed)
        q, k, _ = block.attn.qkv(hidden).reshape(257, 3, 3, width // 3).permute(1, 2, 0, 3)
        chosen = (q @ k.transpose(1, 2)).argmax(2)[:, 1:].reshape(3, 16, 16) - 1
    inner = torch.arange(256).reshape(16, 16)[4:12, 4:12]
    for head, (down, right) in enumerate(model.NEIGHBOURS):
        torch.testing.assert_close(chosen[head, 4:12, 4:12], inner + 16 * down + right, rtol=0, atol=0)


def test_training_repeats_itself() -> None:
    """Two steps twice, bytes compared; and the steps do something."""
    start = model.untrained(torch.Generator().manual_seed(train.SEED)).state_dict()
    runs = []
    for _ in range(2):
        net = model.untrained(torch.Generator().manual_seed(train.SEED))
        runs.append((list(train.train(net, TINY, workers=0)), net.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
    assert not torch.equal(runs[0][1]["blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"])


def test_saving_and_the_committed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model.untrained(torch.Generator().manual_seed(0))
    model.save(net, {"note": 1}, tmp_path)
    model.save(net, {"note": 1}, tmp_path / "again")
    bytes_of = [(folder / "vit.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "again")]
    assert bytes_of[0] == bytes_of[1]
    assert model.WEIGHTS.stat().st_size < 2_000_000
    assert json.loads(model.CONFIG.read_text())["architecture"] == model.ARCHITECTURE
    monkeypatch.setattr(model, "WEIGHTS", tmp_path / "vit.safetensors")
    monkeypatch.setattr(model, "CONFIG", tmp_path / "vit.json")
    for name, value in model.trained().state_dict().items():
        torch.testing.assert_close(value, net.state_dict()[name].half().float(), rtol=0, atol=0)
