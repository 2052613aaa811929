"""tomesd on image encoders: against forwards in which modules are wrapped by hand."""

from __future__ import annotations

import pytest
import torch
from around_oracle import Recipe, merged_around
from rewriting import applied, assert_equal_outputs, captured, distance, rewritten, run
from test_onnx_zoo import assert_file_equals
from toys_attention import mixing_block
from zoo import FAMILIES

from tamis.capture import capture
from tamis.errors import BadParameter, NothingChanged
from tamis.passes import ToMeSD
from tamis.passes.sub_layers import Place
from tamis.rewrite import Pipeline

BOTH = "tomesd:keep_ratio=0.45,merge_mlp=true"
GRIDS = {"vit_small": (14, 14), "deit_distilled": (6, 6), "dinov2_reg4": (7, 7)}  # the last has tokens outside of cells
CASES = [  # name, passes, r of so many patches, cell
    ("vit_small", BOTH, 107, {}),
    ("deit_distilled", BOTH, 19, {}),
    ("deit_distilled", "tomesd:r=30,use_rand=false,sx=3,sy=2", 30, {"sx": 3, "seed": None}),
    ("dinov2_reg4", "tomesd:keep_ratio=0.2,sx=2,sy=3,seed=5", 39, {"sy": 3, "seed": 5}),  # 6 cells: at most 43
    ("dinov2_reg4", "tomesd:r=100", 40, {}),  # 9 cells
]


def expected(name, recipe, inputs, mlp):
    model = FAMILIES[name].shared(torch.float64)
    blocks = [
        (i, block, [block.attn, block.mlp] if mlp else [block.attn], GRIDS[name])
        for i, block in enumerate(model.blocks)
    ]
    with torch.no_grad(), merged_around(blocks, recipe) as seen:
        return [model(*inputs[0])], seen


@pytest.mark.parametrize(("name", "passes", "r", "cell"), CASES)
def test_a_rewritten_encoder_equals_the_wrapped_one(name, passes, r, cell):
    family, result = FAMILIES[name], rewritten(name, passes)
    for batch in (1, 3):
        inputs = family.inputs(batch, seed=batch, dtype=torch.float64)
        outputs, seen = expected(name, Recipe(r, **cell, prefix=family.prefix), inputs, "mlp" in passes)
        assert_equal_outputs(run(result, inputs), outputs, 1e-10)
        assert [(one.before, one.after) for one in applied(result)] == [(family.tokens, after) for after in seen]


def test_outcomes_say_where():
    inside = [(one.layer, one.inside) for one in rewritten("deit_distilled", BOTH).outcomes]
    assert inside == [(layer, kind) for layer in range(3) for kind in ("self-attention", "MLP")]


def test_the_report_says_where_fewer_merge_than_were_asked_for():
    capped, as_asked = rewritten("dinov2_reg4", "tomesd:r=100"), rewritten("dinov2_reg4", "tomesd:r=40")
    why = "100 tokens were to merge, and 40 can: one of each 2 x 2 cell is merged into"
    assert {one.reason for one in applied(capped)} == {why}
    assert {one.reason for one in applied(as_asked)} == {""}


def test_only_the_chosen_blocks():
    result = rewritten("deit_distilled", "tomesd:layers=[-1]")
    assert [one.layer for one in result.outcomes] == [2]
    with pytest.raises(BadParameter, match="between 0 and 2"):
        Pipeline.parse("tomesd:layers=[3]").run(captured("deit_distilled"))


@pytest.mark.parametrize("name", ["eva02", "beit"])
def test_what_belongs_to_tokens_follows_them(name):
    """Rotation and relative position bias: that of the destination, as wherever tokens merge."""
    result, family = rewritten(name, "tomesd:keep_ratio=0.6"), FAMILIES[name]
    assert len(applied(result)) == 3
    alone = run(result, family.inputs(1, dtype=torch.float64))
    together = run(result, family.inputs(4, dtype=torch.float64))
    assert_equal_outputs([x[:1] for x in together], alone, 1e-9)
    assert distance(together[0], run(captured(name), family.inputs(4, dtype=torch.float64))[0]) > 1e-3


@pytest.mark.parametrize("passes", ["tomesd:r=0", "tomesd:keep_ratio=1"])
def test_merging_nothing_changes_nothing(passes):
    with pytest.raises(NothingChanged, match="nothing to remove"):
        Pipeline.parse(passes).run(captured("deit_distilled"))


@pytest.mark.parametrize(
    ("name", "passes", "reason"),
    [
        ("vit_small", "tomesd:image=[28,28]", "2 times coarser than the image, max_downsample is 1"),
        ("vit_small", "tomesd:image=[10,10]", "lie on no known grid"),
        ("vit_small", "tomesd:sx=15", "holds no cell"),
        ("bert", "tomesd", "padding"),
    ],
)
def test_why_not(name, passes, reason):
    with pytest.raises(NothingChanged, match=reason):
        Pipeline.parse(passes).run(captured(name))


def test_a_model_without_a_convolution_needs_an_image():
    model, inputs = mixing_block()
    with pytest.raises(NothingChanged, match="no size of the image is known"):
        Pipeline.parse("tomesd").run(capture(model.blocks[1], inputs))


def test_an_image_of_ones_own():
    given = Pipeline.parse("tomesd:image=[28,28],max_downsample=2").run(captured("vit_small"))
    inputs = FAMILIES["vit_small"].inputs(2, dtype=torch.float64)
    assert_equal_outputs(run(given, inputs), run(rewritten("vit_small", "tomesd"), inputs), 0)


def test_grids_of_coarser_tokens():
    image = (64, 96)
    for step in (1, 2, 4, 8):
        place = Place(0, 1, 64 * 96 // step**2)
        assert (place.downsampling(image), place.grid(image)) == (step, (64 // step, 96 // step))
    odd = Place(0, 1, 5 * 7)  # of 9 x 13 rounded up
    assert (odd.downsampling((9, 13)), odd.grid((9, 13))) == (2, (5, 7))
    assert Place(0, 1, 50).grid((9, 13)) is None


def test_what_needs_all_tokens_is_left_alone():
    model, inputs = mixing_block()
    result = Pipeline.parse("tomesd:image=[4,4]").run(capture(model, inputs), allow_noop=True)
    assert [one.applied for one in result.outcomes] == [False, True]
    assert "needs all tokens" in result.outcomes[0].reason
    with torch.no_grad(), merged_around([(1, model.blocks[1], [model.blocks[1].attention], (4, 4))], Recipe(8)):
        assert_equal_outputs(run(result, (inputs, {})), [model(*inputs)], 1e-10)


def test_the_stream_keeps_its_token_map():
    result = rewritten("deit_distilled", "tomesd", token_map=True)
    outputs = run(result, FAMILIES["deit_distilled"].inputs(2, dtype=torch.float64))
    assert outputs[-1].tolist() == [list(range(38))] * 2


def test_counts_as_symbols_compute_the_same():
    inputs = FAMILIES["deit_distilled"].inputs(3, dtype=torch.float64)
    given = rewritten("deit_distilled", BOTH, symbolic_counts=True)
    assert_equal_outputs(run(given, inputs), run(rewritten("deit_distilled", BOTH), inputs), 1e-12)


def test_onnx_runtime_equals_torch(tmp_path):
    program = rewritten("deit_distilled", "tomesd:keep_ratio=0.4", torch.float32).graph.program
    name = program.graph_signature.user_inputs[0]
    inputs = [FAMILIES["deit_distilled"].inputs(batch) for batch in (1, 5)]
    feeds = [(args, kwargs, {name: args[0].numpy()}) for args, kwargs in inputs]
    called = assert_file_equals(program, feeds, tmp_path / "model.onnx")
    assert called >= {"MatchDestinations", "RestoreTokens"}


@pytest.mark.parametrize(
    "text",
    [
        "tomesd:r=3,keep_ratio=0.5",
        "tomesd:keep_ratio=0",
        "tomesd:keep_ratio=1.2",
        "tomesd:r=-1",
        "tomesd:sx=0",
        "tomesd:max_downsample=true",
        "tomesd:merge_attn=false",
        "tomesd:use_rand=1",
        "tomesd:image=[4]",
        "tomesd:layers=a",
    ],
)
def test_wrong_parameters(text):
    with pytest.raises(BadParameter):
        Pipeline.parse(text)


def test_the_text_of_the_pass():
    assert str(ToMeSD(r=3, image=[4, 4])) == "tomesd:r=3,image=[4,4]"
