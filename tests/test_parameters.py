"""What the user reads when a pass is asked for in a way that cannot be meant, by its text."""

from __future__ import annotations

import dataclasses

import pytest
from rewriting import captured, rewritten

from tamis.errors import (
    BadParameter,
    BadPassText,
    NothingChanged,
    TamisError,
    TooManyRemoved,
    UnknownParameter,
    UnknownPass,
)
from tamis.registry import registered_passes
from tamis.rewrite import Pipeline


def message(error: type[Exception], action) -> str:
    with pytest.raises(error) as caught:
        action()
    assert type(caught.value) is error
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "error", "expected"),
    [
        (
            "tome:keep_ratio=1.3",
            BadParameter,
            "tome: keep_ratio must be in (0, 1], got 1.3.\n  hint: keep_ratio is the fraction kept; 0.3 removes 70%.",
        ),
        (
            "random:keep_ratio=0",
            BadParameter,
            "random: keep_ratio must be in (0, 1], got 0.\n  hint: keep_ratio is the fraction kept; 0.3 removes 70%.",
        ),
        (
            "tome:r=-1",
            BadParameter,
            "tome: r must be whole numbers >= 0, got -1.\n  hint: r is tokens removed per layer.",
        ),
        (
            "tome:r=1.5",
            BadParameter,
            "tome: r must be whole numbers >= 0, got 1.5.\n  hint: r is tokens removed per layer.",
        ),
        (
            "tome:r=many",
            BadParameter,
            "tome: r must be a number, a->b, [list], {layer: amount} or (r, inflection), got 'many'.\n"
            "  hint: for example r=13 or r=26->0.",
        ),
        (
            "tome",
            BadParameter,
            "tome: r or keep_ratio must be given, one of them, got neither.\n  hint: for example r=8.",
        ),
        (
            "tome:r=3,keep_ratio=0.5",
            BadParameter,
            "tome: r or keep_ratio must be given, one of them, got both.\n  hint: for example r=8.",
        ),
        (
            "tome:r=3,layers=all",
            BadParameter,
            "tome: layers must be a list of layer indices, got 'all'.\n  hint: for example layers=[3,6,9].",
        ),
        (
            "tome:r=3,layers=[true]",
            BadParameter,
            "tome: layers must be a list of layer indices, got '[true]'.\n  hint: for example layers=[3,6,9].",
        ),
        (
            "pitome:r=3,bsm=first",
            BadParameter,
            "pitome: bsm must be a list of layer indices, got 'first'.\n  hint: for example bsm=[3,6,9].",
        ),
        (
            "streaming-llm:sink=1.5",
            BadParameter,
            "streaming-llm: sink must be a whole number, got 1.5.\n  hint: its default is 4.",
        ),
        (
            "block-sparse:density=half",
            BadParameter,
            "block-sparse: density must be a number, got 'half'.\n  hint: its default is 0.25.",
        ),
        (
            "ats:keep_ratio=0.5,points=10000000000000000000000",
            BadParameter,
            "ats: points must be between -2147483647 and 2147483647, got 10000000000000000000000.\n"
            "  hint: larger numbers of anything do not fit a tensor.",
        ),
        (
            "tome:r={1:3000000000}",
            BadParameter,
            "tome: r must be between -2147483647 and 2147483647, got 3000000000.\n"
            "  hint: larger numbers of anything do not fit a tensor.",
        ),
        (
            "tomesd:keep_ratio=true",
            BadParameter,
            "tomesd: keep_ratio must be a number, got True.\n  hint: its default is none.",
        ),
        (
            "landmark:top_k=1.5",
            BadParameter,
            "landmark: top_k must be a whole number, got 1.5.\n  hint: its default is none.",
        ),
        (
            "routing:window=all",
            BadParameter,
            "routing: window must be a whole number, got 'all'.\n  hint: its default is none.",
        ),
        (
            "pbs:block=0",
            BadParameter,
            "pbs: block must be 1 or more, got 0.\n  hint: see --list-passes.",
        ),
        (
            "hip:chunks=1.5",
            BadParameter,
            "hip: chunks must be numbers of 1 or more, got 1.5.\n  hint: for example chunks=[8,4,2].",
        ),
        (
            "diffrate:prune=2,merge=1,prune_share=0.3",
            BadParameter,
            "diffrate: prune_share must be left out beside prune and merge, got 0.3.\n"
            "  hint: these say how many are dropped and how many merge.",
        ),
        (
            "evit:passthrough=true",
            BadParameter,
            "evit: passthrough must be false with fuse, got true.\n"
            "  hint: what was fused is in one token; write fuse=false,passthrough=true.",
        ),
        (
            "tone:r=3",
            UnknownPass,
            "unknown pass 'tone'; did you mean tome or tomesd?\n"
            "  hint: optimize-model --list-passes shows all of them.",
        ),
        (
            "zzz",
            UnknownPass,
            "unknown pass 'zzz'.\n  hint: optimize-model --list-passes shows all of them.",
        ),
        (
            "tome:ratio=0.3",
            UnknownParameter,
            "tome: no parameter 'ratio'.\n"
            "  hint: write keep_ratio=0.7; keep_ratio is the fraction kept, everywhere in tamis.",
        ),
        (
            "evit:keep_rate=0.7",
            UnknownParameter,
            "evit: no parameter 'keep_rate'.\n"
            "  hint: write keep_ratio=0.7; keep_ratio is the fraction kept, everywhere in tamis.",
        ),
        (
            "tome:r=3,layer=[1]",
            UnknownParameter,
            "tome: no parameter 'layer'; did you mean layers?\n"
            "  hint: it takes r, keep_ratio, layers, causal, passthrough, matching, k, seed, prop_attn.",
        ),
        (
            "tome:13",
            BadPassText,
            "cannot read the pass 'tome:13': '13' is not key=value.\n"
            "  hint: write name:key=value,key=value, for example tome:r=13.",
        ),
        (
            "13:tome",
            BadPassText,
            "cannot read the pass '13:tome': it does not start with a name.\n"
            "  hint: write name:key=value,key=value, for example tome:r=13.",
        ),
    ],
)
def test_parameters(text, error, expected):
    assert message(error, lambda: Pipeline.parse(text)).replace("?.", "?") == expected.replace("?.", "?")


def test_no_pass_takes_a_whole_number_that_no_tensor_holds():
    asked = 0
    for name, cls in registered_passes().items():
        whole = [f.name for f in dataclasses.fields(cls) if type(f.default) is int]
        given = [{}, {"r": 1}, {"weights": {}}, {"weights": {}, "r": 1}]
        rest = next((one for one in given if whole and makes(cls, one)), {})
        for parameter in whole:
            with pytest.raises(BadParameter, match=str(10**22)):
                cls(**{**rest, parameter: 10**22})
            asked += 1
        assert not whole or makes(cls, rest), f"{name} was not made"
    assert asked > 20


def makes(cls, parameters) -> bool:
    try:
        cls(**parameters)
    except TamisError:
        return False
    return True


def test_a_schedule_of_steps_names_layers_that_there_are():
    with pytest.raises(BadParameter, match="between 0 and 2, got 7"):
        rewritten("vit_mean", "zero-tprune:r=3,iterations={7: 2}")


def test_layers_of_a_table_count_from_the_end_too():
    assert [o.after for o in rewritten("vit_mean", "tome:r={0: 2, -1: 3}").outcomes if o.applied] == [35, 32]


def test_a_layer_that_does_not_exist():
    text = message(BadParameter, lambda: rewritten("vit_mean", "tome:r=3,layers=[3]"))
    assert text == ("tome: layers must be between 0 and 2, got 3.\n  hint: the model has 3 layers.")


def test_more_tokens_than_there_are_is_an_error_at_the_first_layer():
    text = message(TooManyRemoved, lambda: rewritten("vit_mean", "tome:r=19"))
    assert text == (
        "tome at layer 0 (body.blocks.0.attn): r=19 tokens cannot be removed from 37 tokens of which 1 are protected; "
        "at most 18 can.\n  hint: use r=18 or less, or a schedule that falls, such as r=18->0."
    ).replace("body.", "")


def test_more_tokens_than_are_left_is_clamped_at_later_layers():
    result = rewritten("vit_mean", "tome:r=18")
    assert [(o.before, o.after) for o in result.outcomes] == [(37, 19), (19, 10), (10, 6)]


def test_a_pass_that_changes_nothing_says_where_and_why():
    text = message(NothingChanged, lambda: rewritten("vit_mean", "tome:r=0"))
    assert text == (
        "tome:r=0: asked for, but nothing in the model changed.\n"
        "  layer 0: nothing to remove here (r=0 or keep_ratio=1)\n"
        "  layer 1: nothing to remove here (r=0 or keep_ratio=1)\n"
        "  layer 2: nothing to remove here (r=0 or keep_ratio=1)\n"
        "  hint: allow_noop=True (--allow-noop) accepts a result equal to the original."
    )
    assert NothingChanged.exit_code == 3


def test_one_idle_pass_among_others_is_an_error_too():
    text = message(NothingChanged, lambda: Pipeline.parse("tome:r=3 + random:r=0").run(captured("vit_mean")))
    assert text.startswith("random:r=0: asked for, but nothing in the model changed.")
