"""What a reduction costs a GPU beside the dense model, counted: launches per layer, and bytes against the floor."""

from __future__ import annotations

from functools import cache

import pytest
import timm
import torch
from launch_counts import Work, count_work, on_gpu
from rewriting import captured, rewritten
from zoo import FAMILIES, quietly

from tamis.capture import capture
from tamis.rewrite import Pipeline


@cache
def counted(family: str, passes: str) -> tuple[Work, Work]:
    """The dense model and the reduced one, whose outputs are left short: to restore them is no work of a layer."""
    args, kwargs = FAMILIES[family].inputs(8, dtype=torch.float32)
    dense = captured(family, torch.float32).program
    reduced = on_gpu(rewritten(family, passes, torch.float32, restore=False).graph.program)
    return count_work(dense, args, kwargs), count_work(reduced, args, kwargs)


def test_a_dense_model_is_counted_as_by_hand():
    dense, _ = counted("vit_small", "tome:r=13")
    block = ["norm", "qkv", "attention", "projection", "add and norm", "up", "gelu", "down and the next add"]
    assert dense.launches == len(["patches", "head"]) + 2 * len(block) + len(["last norm"])
    assert dense.extern == 2 + 5 * 2


@pytest.mark.parametrize(
    ("family", "passes", "layers"),
    [("vit_small", "tome:r=13", 2), ("deit_distilled", "tome:r=5", 3), ("dinov2_reg4", "tome:r=4", 3)],
)
def test_merging_costs_one_launch_per_layer(family, passes, layers):
    dense, reduced = counted(family, passes)
    assert reduced.launches - dense.launches == layers
    assert {name.rstrip("_0123456789") for name in reduced.twins} == {
        "attention",
        "bipartite_match",
        "add_reduce_norm_default",
    }
    assert reduced.pointwise <= dense.pointwise  # nothing is left between the kernels


@pytest.mark.parametrize(("family", "layers"), [("bert", 3), ("roberta", 2), ("hf_vit", 3)])
def test_merging_costs_at_most_two_launches_per_layer_elsewhere(family, layers):
    passes = "tome:r=3" if family == "hf_vit" else "tome:keep_ratio=0.8"
    dense, reduced = counted(family, passes)
    assert 0 < reduced.launches - dense.launches <= 2 * layers


@cache
def stage(name: str, size: int, r: int) -> tuple[Work, int, int, int]:
    """The reduced model in bfloat16 with 256 images; its tokens, features, and features of a head."""
    model = quietly(lambda: timm.create_model(name, depth=2, num_classes=0)).eval().bfloat16()
    images = torch.zeros(2, 3, size, size, dtype=torch.bfloat16)
    graph = Pipeline.parse(f"tome:r={r}").run(capture(model, (images,))).graph
    work = count_work(on_gpu(graph.program), (images.new_empty((256, *images.shape[1:]), device="meta"),), {})
    tokens = 1 + (size // model.patch_embed.patch_size[0]) ** 2
    return work, tokens, model.embed_dim, model.blocks[0].attn.head_dim


@pytest.mark.parametrize(
    ("name", "size", "r"), [("vit_base_patch16_224", 224, 13), ("vit_large_patch14_clip_336", 336, 23)]
)
def test_bytes_of_a_layer_are_within_their_budget(name, size, r):
    """The floor reads the stream and what is added, writes the merged stream and its norm, and a float32 metric."""
    work, tokens, width, head = stage(name, size, r)
    for layer in range(2):
        before, after = tokens - r * layer, tokens - r * (layer + 1)
        rows, metric = 2 * (before + after) * width * 2, before * head * 4
        suffix = f"_{layer}" if layer else ""
        match, merge = work.moved[f"bipartite_match{suffix}"], work.moved[f"add_reduce_norm_default{suffix}"]
        assert merge <= 1.02 * 256 * rows
        assert match + merge <= 1.3 * 256 * (rows + metric)
