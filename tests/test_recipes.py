"""Recipes: the token counts that the cards print, schedules, and every way to write a pass."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamis.passes import EViT, RandomDrop, ToMe
from tamis.rewrite import Pipeline
from tamis.schedule import Schedule


def count_trace(method, tokens, layers, prefix=1):
    """Tokens before the first and after every selected layer."""
    counts = [tokens]
    for layer in method.selected(layers):
        counts.append(method.rule(layer, layers, prefix).out(counts[-1]))
    return counts


@pytest.mark.parametrize(
    ("method", "tokens", "layers", "expected"),
    [
        (ToMe(r=16), 197, 12, [197, 181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]),  # card 1.8
        (EViT(keep_ratio=0.9), 197, 12, [197, 179, 163, 148]),  # card 7.3, with fuse
        (EViT(keep_ratio=0.8), 197, 12, [197, 159, 129, 105]),
        (EViT(), 197, 12, [197, 140, 100, 72]),
        (EViT(keep_ratio=0.6), 197, 12, [197, 120, 74, 46]),
        (EViT(keep_ratio=0.5), 197, 12, [197, 100, 52, 28]),
    ],
)
def test_count_traces_of_the_cards(method, tokens, layers, expected):
    assert count_trace(method, tokens, layers) == expected


def test_other_counts_of_card_1():
    assert count_trace(ToMe(r=13), 197, 12)[-1] == 41
    trace = count_trace(ToMe(r=25), 577, 24)
    assert (trace[8], trace[16], trace[22], trace[24]) == (377, 177, 27, 8)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((13, -1), [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]),  # card 1.3
        ((16, -1), [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]),
        ((13, 1), [0, 2, 4, 7, 9, 11, 14, 16, 18, 21, 23, 26]),
        ((13, -0.5), [19, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7]),
        ("26->0", [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]),
        (13, [13] * 12),
        ([16, 12, 8], [16, 12, 8, *[0] * 9]),
        ({3: 16, 6: 8}, [0, 0, 0, 16, 0, 0, 8, 0, 0, 0, 0, 0]),
    ],
)
def test_schedules_of_card_1(value, expected):
    schedule = Schedule.of(value)
    assert [schedule.at(layer, 12) for layer in range(12)] == expected
    assert Schedule.of(str(schedule)) == schedule


def test_a_published_schedule_over_24_layers():
    assert sum(Schedule.of((8, -1)).at(layer, 24) for layer in range(24)) == 181


AMOUNTS = (
    st.integers(0, 99)
    | st.lists(st.integers(0, 99), min_size=1, max_size=4)
    | st.dictionaries(st.integers(0, 11), st.integers(0, 99), min_size=1, max_size=3)
    | st.tuples(st.integers(1, 20), st.sampled_from([-1, 1, -0.5, 0.25]))
    | st.builds("{}->{}".format, st.integers(0, 99), st.integers(0, 99))
)
LAYERS = st.none() | st.lists(st.integers(-3, 11), min_size=1, max_size=4)
PASSES = (
    st.builds(ToMe, r=AMOUNTS, prop_attn=st.booleans(), layers=LAYERS)
    | st.builds(EViT, keep_ratio=st.sampled_from([0.1, 0.7, 1, "0.9->0.5"]), fuse=st.booleans(), layers=LAYERS)
    | st.builds(RandomDrop, r=AMOUNTS, seed=st.integers(0, 10**9), layers=LAYERS)
)


@given(st.lists(PASSES, min_size=1, max_size=3))
def test_a_pipeline_survives_its_own_text(passes):
    pipeline = Pipeline(tuple(passes))
    assert Pipeline.parse(str(pipeline)) == pipeline


@pytest.mark.parametrize(
    "form",
    [
        "tome:r=13,layers=[0,1] + evit:keep_ratio=0.7",
        ["tome:r=13,layers=[0,1]", "evit:keep_ratio=0.7"],
        [{"tome": {"r": 13, "layers": [0, 1]}}, {"evit": {"keep_ratio": 0.7}}],
        {"tome": {"r": 13, "layers": [0, 1]}, "evit": {"keep_ratio": 0.7}},
        [ToMe(13, layers=[0, 1]), EViT(keep_ratio=0.7)],
        " tome : r = 13 , layers = [0, 1] + evit".replace(" : ", ":"),
    ],
)
def test_every_way_to_write_a_recipe_means_the_same(form):
    assert Pipeline.parse(form) == Pipeline((ToMe(r=13, layers=[0, 1]), EViT(keep_ratio=0.7)))
