"""What is said where sparse attention reads all keys, and of FLOPs that a pass adds."""

from __future__ import annotations

from typing import Any

import pytest
from decoders import captured, prompt
from zoo import FAMILIES

import tamis
from tamis.errors import NothingChanged
from tamis.passes.methods.block_sparse import BlockSparse
from tamis.passes.sparse_reach import first_sparse, reads_all
from tamis.report import Report
from tamis.rewrite import parse_passes


def fast(passes: str, tokens: int = 20, **options: Any) -> Any:
    return tamis.compile(captured("llama")[1].program, kwargs=prompt(1, tokens, None), passes=passes, **options)


def test_the_report_says_from_where_on_keys_are_left_out() -> None:
    (note,) = fast("a-shape:sink=2,local=40", verify=False).report.notes
    assert note == "a-shape:sink=2,local=40: at 20 tokens it reads every key; it leaves some out from about 50 on"
    (note,) = fast("block-sparse:density=1.0", verify=False).report.notes
    assert note.endswith("at 20 tokens it reads every key; so it does up to 8192")
    assert fast("a-shape:sink=2,local=10", verify=False).report.notes == ()


@pytest.mark.parametrize(
    ("text", "reads", "leaves"),
    [
        ("a-shape:sink=2,local=40", 42, 43),
        ("tri-shape:sink=2,local=20,last=5", 27, 28),
        ("block-sparse:density=0.5,block=16", 32, 33),
        ("x-attention:density=1.0,threshold=0.9,block=8", 8, 64),  # by data: like tokens hold a quarter of it
        ("sparge:block=8", 8, 64),
        ("longformer:window=8", 6, 7),
    ],
)
def test_it_is_found_to_the_token(text: str, reads: int, leaves: int) -> None:
    graph = captured("llama")[1]
    (method,) = parse_passes(text)
    site = graph.sites[0]
    assert reads_all(method, site, reads)  # type: ignore[arg-type]
    assert not reads_all(method, site, leaves)  # type: ignore[arg-type]


def test_the_first_length_lies_within_a_step() -> None:
    site = captured("llama")[1].sites[0]
    (method,) = parse_passes("a-shape:sink=2,local=600")
    found = first_sparse(method, site, 20)  # type: ignore[arg-type]
    assert found is not None
    assert 603 <= found <= 603 + 603 // 16 + 1


def test_a_model_of_one_length_that_is_too_short_is_refused() -> None:
    family = FAMILIES["vit_small"]
    model, images = family.model(layers=1), family.inputs(2)[0]
    with pytest.raises(NothingChanged) as caught:
        tamis.compile(model, images, passes="block-sparse:block=256", verify=False)
    text = str(caught.value)
    assert text.startswith("block-sparse:block=256: asked for, but nothing in the model changed.\n  at ")
    assert "tokens, the only length of the model, it reads every key; it leaves some out from about 258 on\n" in text
    accepted = tamis.compile(model, images, passes="block-sparse:block=256", verify=False, allow_noop=True)
    assert "it reads every key" in accepted.report.notes[0]


def test_a_method_that_needs_a_model_is_not_judged() -> None:
    class NeedsWeights(BlockSparse):
        def index(self, heads: Any) -> Any:
            return heads.weights["centroids"]

    assert not reads_all(NeedsWeights(), captured("llama")[1].sites[0], 8)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [(200, 100, "2.00x fewer"), (100, 102, "1.02x more"), (1000, 1001, "as many"), (1001, 1000, "as many")],
)
def test_flops_that_a_pass_adds_are_more(before: int, after: int, said: str) -> None:
    report = Report("m", ("p",), flops_before=before, flops_after=after)
    assert report.headline() == f"m: p; {before if before < 1000 else f'{before / 1000:.2f} k'} -> " + (
        f"{after if after < 1000 else f'{after / 1000:.2f} k'} FLOPs ({said})"
    )
