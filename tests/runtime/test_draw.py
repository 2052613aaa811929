"""Pictures of where tokens went: the maps behind them against the oracle, what is painted, and what is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from command import run
from matplotlib.image import imread
from oracle import reduced_forward
from zoo import FAMILIES

import tamis
from tamis.drawing_errors import CannotDraw
from tamis.errors import OutputExists
from tamis.runtime import draw
from tamis.runtime.compiled import CompiledModel
from tamis.runtime.journey import _removes, journey

RECIPE = "evit:keep_ratio=0.6,fuse=false,layers=[0] + tome:r=4,layers=[1,2]"
FAMILY = FAMILIES["deit_distilled"]
FACTORY = """
from zoo import FAMILIES

def small():
    return FAMILIES["deit_distilled"].model(), FAMILIES["deit_distilled"].inputs(2)[0]
"""


@cache
def compiled() -> CompiledModel:
    return tamis.compile(FAMILY.shared(), FAMILY.inputs(2)[0], passes=RECIPE, verify=False)


def test_the_maps_are_the_plans_of_the_oracle_one_after_another() -> None:
    inputs = FAMILY.inputs(3)
    plans = reduced_forward(FAMILY, FAMILY.shared(), inputs, RECIPE).stream.plans
    stages = journey(compiled().graph.program, inputs, compiled().report)
    assert [(one.method.partition(":")[0], one.layer) for one in stages] == [("evit", 0), ("tome", 1), ("tome", 2)]
    assert [one.tokens for one in stages] == [plan.out for plan in plans]
    for b in range(3):
        where = list(range(FAMILY.tokens))
        for plan, stage in zip(plans, stages, strict=True):
            where = [-1 if at < 0 else int(plan.slot[b, at]) for at in where]
            assert stage.source[b].tolist() == where
    assert -1 in stages[0].source


def test_plans_that_leave_as_many_slots_are_stages_and_what_applies_no_plan_is_none() -> None:
    counts = {"a plan": (9, 9), "of unknown length": ("s3", "s4"), "appending": (9, 11), "sparse": (None, None)}
    found = {name for name, (before, after) in counts.items() if _removes({"before": before, "after": after})}
    assert found == {"a plan", "of unknown length"}


def test_dropped_patches_are_pale_groups_have_one_colour_and_outlines_and_the_rest_is_as_it_was() -> None:
    image = torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(0))  # patches of 2 x 2: 2 rows, 3 columns
    panel = draw._shown(image, (2, 3), [7, 7, -1, 7, 4, 5])
    picture = torch.from_numpy(panel["picture"])
    assert torch.equal(picture[2:, 2:], image[2:, 2:])
    assert (picture[:2, 4:] >= draw.DIMMED).all()
    mean = torch.cat([image[:2, :2], image[:2, 2:4], image[2:, :2]]).mean((0, 1))
    expected = (1 - draw.TINTED) * image[:2, :4] + draw.TINTED * mean
    torch.testing.assert_close(picture[:2, :4], expected)
    assert len(panel["lines"]) == len(panel["colours"]) == 8  # around an L of three patches
    assert len(set(panel["colours"])) == 1


def test_a_group_keeps_its_colour_when_slots_are_numbered_anew() -> None:
    image = torch.zeros(4, 4, 3)
    before, after = (draw._shown(image, (2, 2), slots)["colours"] for slots in ([9, 2, 9, 2], [0, 1, 0, 1]))
    assert before == after
    assert len(set(before)) == 2


def test_groups_near_each_other_have_colours_that_differ_and_the_key_names_the_marks_there_are() -> None:
    steps = [(r, c) for r in range(3) for c in range(-2, 3) if (r, c) > (0, 0)]
    for row, column in ((4, 4), (5, 7), (13, 2)):
        mine = draw._colour(row, column)
        for r, c in steps:
            assert sum((a - b) ** 2 for a, b in zip(mine, draw._colour(row + r, column + c), strict=True)) ** 0.5 > 0.3
    assert draw._key([[0, 1, 2]]) == draw.KEPT
    assert draw._key([[0, -1, 1], [0, -1, -1]]) == f"{draw.DROPPED}   {draw.KEPT}"
    assert draw._key([[0, 1, 1]]) == f"{draw.MERGED}   {draw.KEPT}"


def test_a_file_is_written_once_and_a_loaded_program_draws_the_same(tmp_path: Path) -> None:
    images = FAMILY.inputs(3)[0]
    path = compiled().draw(tmp_path / "a.png", *images, row=2)
    picture = imread(path)
    assert min(picture.shape[:2]) > 200
    with pytest.raises(OutputExists):
        compiled().draw(path, *images)
    loaded = tamis.load(compiled().save(tmp_path / "x.pt2"))
    assert isinstance(loaded, CompiledModel)
    loaded.draw(tmp_path / "b.png", *images, row=2)
    assert (imread(tmp_path / "b.png") == picture).all()
    compiled().draw(tmp_path / "c.png", *images, row=1)
    assert (imread(tmp_path / "c.png") != picture).any()


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    text = FAMILIES["bert"]
    short = tamis.compile(text.model(layers=1), (), kwargs=text.inputs(2)[1], passes="tome:r=2", verify=False)
    same = tamis.compile(FAMILY.shared(), FAMILY.inputs(2)[0], passes="tome:r=0", allow_noop=True, verify=False)
    for action, reason in (
        (lambda: short.draw(tmp_path / "a.png"), "none of its inputs is an image"),
        (lambda: compiled().draw(tmp_path / "a.png", row=2), "there is no row 2 among 2"),
        (lambda: compiled().draw(tmp_path / "a.jpg"), "only .png files are drawn"),
        (lambda: same.draw(tmp_path / "a.png"), "the program reduces no tokens"),
    ):
        with pytest.raises(CannotDraw, match=reason):
            action()
    assert list(tmp_path.iterdir()) == []


def test_by_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(FACTORY)
    ask = ("net.py:small", "--pass", RECIPE, "-o", "x.pt2", "--draw", "x.png", "-q")
    code, out, err = run(capsys, *ask)
    assert (code, err) == (0, "")
    assert out.splitlines()[-2:] == ["wrote x.pt2", "wrote x.png"]
    assert imread("x.png").shape[2] == 4
    (tmp_path / "x.pt2").unlink()
    assert "x.png: exists already" in run(capsys, *ask)[2]
    assert "only PNG is drawn" in run(capsys, *ask[:-2], "x.jpg")[2]
