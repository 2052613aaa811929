"""`--check`: every registered pass at every site, and models that have nothing to reduce."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from decoders import captured, prompt
from zoo import FAMILIES

from tamis import registry
from tamis.capture import capture
from tamis.graph import Mask, Rotation, TokenGraph
from tamis.passes import BigBird, EViT, Longformer, ToMe
from tamis.registry import registered_passes
from tamis.rewrite import Pipeline
from tamis.runtime import check, cli
from tamis.runtime.check import check_model
from tamis.runtime.render import print_check

NETS = """\
import timm
import torch

def cnn():
    return timm.create_model("resnet10t", pretrained=False).eval(), (torch.zeros(2, 3, 32, 32),)

def swin():
    options = {"depths": (1, 1), "embed_dim": 16, "num_heads": (1, 1), "img_size": 56, "window_size": 7}
    return timm.create_model("swin_tiny_patch4_window7_224", **options).eval(), (torch.zeros(2, 3, 56, 56),)

def training():
    return timm.create_model("vit_tiny_patch16_224", depth=1).train(), (torch.zeros(2, 3, 224, 224),)
"""


@pytest.fixture(scope="module")
def graph() -> TokenGraph:
    """SigLIP's attention pooling makes a site that is not of the stream."""
    args, kwargs = FAMILIES["siglip"].inputs(2)
    return capture(FAMILIES["siglip"].model(layers=4), args, kwargs, name="siglip")


def checked(graph: TokenGraph) -> dict[str, Any]:
    return check_model(graph, FAMILIES["siglip"].inputs(2))


def test_every_pass_answers_for_every_site(graph: TokenGraph) -> None:
    found = checked(graph)
    passes = {one["name"]: one for one in found["passes"]}
    assert set(passes) == set(registered_passes())
    for one in passes.values():
        assert [place["site"] for place in one["places"]] == [0, 1, 2, 3, 4] or one["tried"] == ""
        for place in one["places"]:
            assert place["applies"] != bool(place["reason"]), "a place has a reason if and only if the pass skips it"
    assert [place["applies"] for place in passes["tome"]["places"]] == [True] * 4 + [False]
    assert passes["tome"]["places"][1]["tokens_in"] == str(FAMILIES["siglip"].tokens - 1)
    assert "not" in passes["tome"]["places"][4]["reason"]
    assert passes["random"]["layers"] == "0, 1, 2, 3"
    assert passes["evit"]["applies"] is False
    assert {place["reason"] for place in passes["evit"]["places"][:4]} == {
        "it scores tokens by the class token's attention, and this model has no class token"
    }


def test_passes_that_were_asked_for_are_tried_alone_and_as_they_are(
    graph: TokenGraph, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = check_model(graph, FAMILIES["siglip"].inputs(2), passes=[ToMe(r=2, layers=[1])])
    assert [(one["name"], one["tried"], one["layers"]) for one in found["passes"]] == [
        ("tome", "tome:r=2,layers=[1]", "1")
    ]
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETS)
    assert cli.main(["net.py:cnn", "--check", "-q", "--pass", "tome:q=2"]) == 2
    assert "no parameter 'q'" in capsys.readouterr().err


def test_sparse_attention_that_reads_every_key_does_not_apply_to_a_model_of_one_length(graph: TokenGraph) -> None:
    """As compiling would say; where the length may change, it applies, and the reason says so."""
    passes = [Longformer(window=4096), Longformer(window=4)]
    idle, sparse = check_model(graph, FAMILIES["siglip"].inputs(2), passes=passes)["passes"]
    tokens = FAMILIES["siglip"].tokens
    assert idle["applies"] is False
    assert idle["reason"] == f"at {tokens} tokens, the only length of the model, it reads every key"
    assert idle["places"][0]["reason"] == idle["reason"]
    assert sparse["layers"] == "0, 1, 2, 3"
    (found,) = check_model(captured("llama")[1], ((), prompt(2, 12, "left")), passes=passes[:1])["passes"]
    assert found["applies"] is True
    assert found["reason"] == "at 12 tokens it reads every key"


def test_layers_alike_are_answered_by_the_first_of_them_as_all_would_be(graph: TokenGraph) -> None:
    one = BigBird(layers=[1, 2, 3])
    plain = Pipeline((one,)).run(graph, allow_noop=True).outcomes
    assert check._outcomes(one, graph) == plain
    assert len(plain) == 3


def test_layers_that_a_pass_does_not_choose(graph: TokenGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    """EViT's default layers are 1, 2, 3 of 4."""
    monkeypatch.setattr(registry, "_REGISTRY", {"evit": EViT})
    passes = {one["name"]: one for one in checked(replace(graph, class_token=True, prefix=1))["passes"]}
    assert passes["evit"]["layers"] == "1, 2, 3"
    why = "the pass does not choose this layer by default; layers=[...] does"
    assert passes["evit"]["places"][0]["reason"] == why
    assert passes["evit"]["reason"] == f"layer 0: {why}"


def test_what_sites_are(graph: TokenGraph, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts that are not of this model are put in: only their description is looked at."""
    monkeypatch.setattr(registry, "_REGISTRY", {})
    facts = [
        {"mask": Mask("window", "m", padded=True, window=(64, 64)), "heads": 8, "kv_heads": 2},
        {"mask": Mask("causal", "m", causal=True)},
        {"mask": Mask("window", "m", causal=True, window=(None, 0)), "k_rotation": Rotation("k")},
        {"causal": True},
        {},
    ]
    sites = tuple(replace(site, **fact) for site, fact in zip(graph.sites, facts, strict=True))
    found = checked(replace(graph, sites=sites))
    dim = graph.sites[0].head_dim
    assert found["sites"][0]["heads"] == f"8 / 2 x {dim}"
    assert [site["mask"] for site in found["sites"]] == [
        "window 64 before, 64 after + padding",
        "causal",
        "window all before, 0 after + causal",
        "causal",
        "full",
    ]
    assert [site["rope"] for site in found["sites"]] == ["", "", "yes", "", ""]
    assert [site["role"] for site in found["sites"]] == ["stream"] * 4 + ["pool"]
    assert {site["cuts"] for site in found["sites"][:4]} == {"before attention, after attention, after block"}
    print_check(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("siglip: 5 attention sites, 4 layers in the token stream, grid ")
    assert lines[1].startswith("input ")
    columns = r"site +node +module +role +heads +mask +layer +tokens can leave +RoPE +remark *"
    assert re.fullmatch(columns, lines[2])
    found["sites"][2]["rope"] = ""
    print_check(found)
    assert "RoPE" not in capsys.readouterr().out, "a column that says nothing is left out"


@pytest.mark.parametrize(
    ("name", "text"),
    [("cnn", "no attention was found"), ("swin", "runs inside windows: it sees 49 tokens")],
)
def test_models_without_tokens_to_reduce(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, text: str
) -> None:
    """The question is answered (0); a request to reduce them cannot be met, whatever the pass (2)."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETS)
    assert cli.main([f"net.py:{name}", "--check", "-q"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith(f"{name}: no pass applies\n{name}: ")
    assert text in out
    assert cli.main([f"net.py:{name}", "--check", "-q", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert text in found["refused"]
    assert {one["applies"] for one in found["passes"]} == {False}
    assert {"name", "summary", "inputs", "sites", "passes", "refused"} <= set(found)
    assert cli.main([f"net.py:{name}", "--pass", "tome:r=1", "-q"]) == 2
    assert text in capsys.readouterr().err


def test_a_model_that_cannot_be_looked_into(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETS)
    for ask in (["--check"], ["--pass", "tome:r=1"]):
        assert cli.main(["net.py:training", "-q", *ask]) == 2
        assert "the model is in training mode" in capsys.readouterr().err
