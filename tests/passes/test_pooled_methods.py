"""Methods whose attention is more than an index, against weights written out token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pooled_oracle as oracle
import pytest
import torch
from decoders import captured as captured_decoder
from decoders import prompt
from pooled_oracle import mixed, model_by_hand
from rewriting import captured, run
from sparse_oracle import drawn, expanded, fixture
from test_sparse_decoders import logits, original
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import FAMILIES

from tamis.attention_index import Heads
from tamis.errors import BadParameter
from tamis.passes.methods.combiner import CCA, Combiner
from tamis.passes.methods.dilated import Dilated
from tamis.passes.methods.landmark import Landmark
from tamis.passes.methods.routing import Routing
from tamis.rewrite import Pipeline, build_pass

Weighed = Callable[[Heads, Any], Tensor]
CASES: dict[str, tuple[Any, Weighed]] = {
    "combiner": (Combiner(span=4), oracle.combiner),
    "combiner-mean": (Combiner(span=5, pool="mean", log_size=True), oracle.combiner),
    "cca": (CCA(span=4, local=6), oracle.cca),
    "cca-aligned": (CCA(span=3, local=4), oracle.cca),
    "landmark": (Landmark(mem_freq=3), oracle.landmark),
    "landmark-some": (Landmark(mem_freq=4, top_k=2), oracle.landmark),
    "routing": (Routing(clusters=4), oracle.routing),
    "routing-window": (Routing(clusters=5, window=3, rounds=1), oracle.routing),
    "dilated": (Dilated(step=2, local=5, sink=3), oracle.dilated),
    "dilated-near": (Dilated(step=2, local=3, sink=2, near=4), oracle.dilated),
    "dilated-odd": (Dilated(step=3, local=2, sink=1, first=1, near=5), oracle.dilated),
    "dilated-alone": (Dilated(step=4, local=2, sink=0), oracle.dilated),
    "dilated-first": (Dilated(step=3, local=3, sink=2, first=2), oracle.dilated),
}
every_case = pytest.mark.parametrize(("method", "weighed"), CASES.values(), ids=CASES)


def rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


@every_case
@pytest.mark.parametrize("tokens", [1, 4, 23])
def test_attention_is_what_the_definition_weighs(method: Any, weighed: Weighed, tokens: int) -> None:
    heads = drawn(tokens, tokens, lengths=[tokens, max(1, tokens - 8)])
    for one in (heads, replace(heads, lengths=None, softcap=1.5)):
        torch.testing.assert_close(method.attend(one).double(), mixed(one, weighed(one, method)), rtol=1e-5, atol=1e-5)


@every_case
def test_the_cases_are_not_dense(method: Any, weighed: Weighed) -> None:
    heads = drawn(1, 23)
    found, dense = weighed(heads, method), weighed(heads, method.full(23))
    read = found.sum(-1)
    some = (read > 0).double()
    torch.testing.assert_close(read, some if isinstance(method, Routing) else torch.ones_like(read))
    assert some.any()
    assert (mixed(heads, found) - mixed(heads, dense)).norm() > 0.05 * mixed(heads, dense).norm()


@every_case
def test_where_tokens_see_later_ones(method: Any, weighed: Weighed) -> None:
    if not method.bidirectional or getattr(method, "near", 0):
        return
    heads = replace(drawn(2, 23, lengths=[23, 14]), causal=False)
    expected = mixed(heads, weighed(heads, method))
    torch.testing.assert_close(method.attend(heads).double(), expected, rtol=1e-5, atol=1e-5)


@every_case
def test_later_tokens_change_nothing(method: Any, weighed: Weighed) -> None:
    """The first 13 of 23 tokens get what they would get alone; methods that say otherwise are shown to."""
    heads = drawn(3, 23)
    alone = replace(heads, **{part: getattr(heads, part)[:, :, :13] for part in ("queries", "keys", "values")})
    change = (method.attend(heads)[:, :, :13] - method.attend(alone)).abs().max().item()
    assert (change > 1e-2) if method.looks_ahead else (change < 1e-5)


def shares(method: Any) -> Tensor:
    """What the last token of the fixture's first head gives to every token."""
    heads = fixture()
    return method.attend(replace(heads, values=torch.eye(16).double()[None, None]))[0, 0, 15]


def test_combiner_example() -> None:
    found = shares(Combiner(span=4))
    assert rounded(found[:12].reshape(3, 4).sum(1)) == [0.0010, 0.1318, 0.0007]
    assert rounded(found[12:]) == [0.0010, 0.0032, 0.1988, 0.6635]


def test_cca_example() -> None:
    found = CCA(span=4).weights(fixture())[0, 0, :2, 0]
    assert rounded(found[0]) == [0.2412, 0.1350, 0.0755, 0.5483]
    assert rounded(found[1]) == [0.9718, 0.0146, 0.0086, 0.0050]


def test_landmark_example() -> None:
    """The card's blocks of three tokens and a landmark end in a fourth token; the others get one without weight.

    Landmarks are 3, 7 and 11, and the last block is 12 .. 15.
    """
    heads, filler = fixture(), torch.tensor([16])
    order = torch.cat([torch.cat([torch.arange(3) + at, filler, torch.tensor([at + 3])]) for at in (0, 4, 8)])
    order = torch.cat([order, torch.arange(12, 16)])
    lost = -1e3 * heads.queries[:, :1, 15:]
    queries, keys = (torch.cat([x, lost], 2)[:, :, order] for x in (heads.queries[:, :1], heads.keys))
    values = torch.eye(17).double()[None, None][:, :, order]
    wide = replace(heads, queries=queries, keys=keys, values=values)
    expected = [0, 0, 0.0002, 0, 0.0018, 0.1133, 0.3782, 0, 0, 0, 0.0001, 0, 0.0006, 0.0019, 0.1161, 0.3877, 0]
    for method in (Landmark(mem_freq=4), Landmark(mem_freq=4, top_k=3)):
        assert rounded(method.attend(wide)[0, 0, 18]) == expected


def test_dilated_example() -> None:
    """Pairs of 16 tokens and the last one's keys: with sinks and a dilated window, and with a dense one before it."""
    heads = replace(fixture(), values=torch.eye(16).double()[None, None])
    for method, pairs, last in (
        (Dilated(step=2, local=3, sink=2), 67, [0, 1, 11, 13, 15]),
        (Dilated(step=2, local=2, sink=2, near=4), 99, [0, 1, 9, 11, 12, 13, 14, 15]),
    ):
        read = method.attend(heads) != 0
        assert read.sum((0, 2, 3)).tolist() == [pairs, pairs]
        assert read[0, 0, 15].nonzero().flatten().tolist() == last


@pytest.mark.parametrize("case", [name for name in CASES if "dilated" in name])
@pytest.mark.parametrize("window", [3, 5, 9])
def test_dilated_windows_end_with_the_model_s(case: str, window: int) -> None:
    method, weighed = CASES[case]
    heads = drawn(6, 23, lengths=[23, 14], window=window)
    for one in (heads, replace(heads, causal=False)):
        if one.causal or not method.near:
            expected = mixed(one, weighed(one, method))
            torch.testing.assert_close(method.attend(one).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [name for name in CASES if "dilated" in name])
@pytest.mark.parametrize("window", [0, 9])
def test_a_dilated_index_names_what_is_read(case: str, window: int) -> None:
    method, weighed = CASES[case]
    heads = drawn(6, 23, lengths=[23, 14], window=window)
    for one in (heads, replace(heads, causal=False), drawn(7, 1)):
        if one.causal or not method.near:
            assert torch.equal(expanded(method.index(one), one), weighed(one, method) > 0)


def test_near_tokens_are_those_before() -> None:
    assert Dilated(near=4).why_not_at(captured_decoder("llama")[1].sites[0]) == ""
    site = captured("bert", torch.float32).sites[0]
    assert Dilated().why_not_at(site) == ""
    assert "near is for causal attention" in Dilated(near=4).why_not_at(site)


def test_cca_reads_no_token_twice() -> None:
    """As printed, token 12 of 1 .. 16 would be in group 3 and in the window of 4 tokens."""
    window = oracle.cca(drawn(4, 16), CCA(span=4, local=4))[0, 0, 15]
    assert window.sum().item() == pytest.approx(1)
    groups = CCA(span=4, local=4).weights(fixture())[0, 0, 2, 0]
    found = shares(CCA(span=4, local=4))[8:12].float()
    torch.testing.assert_close(found, groups * found.sum())


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("llama", "combiner"),
        ("llama", "dilated-odd"),
        ("qwen2", "cca"),
        pytest.param("qwen2", "landmark-some", marks=pytest.mark.full),
    ],
)
def test_decoders_are_what_the_definition_weighs(name: str, case: str) -> None:
    """A whole model with its second layer's attention written out, beside the rewritten one."""
    method, weighed = CASES[case]
    model, graph = captured_decoder(name)
    result = Pipeline.parse(replace(method, layers=[1])).run(graph)
    assert [o.layer for o in result.outcomes if o.applied] == [1]
    inputs = prompt(2, 29, None)
    turning = partial(weighed, turn=oracle.rotated) if method.moves else weighed
    expected = model_by_hand(model, inputs, 1, True, lambda heads: mixed(heads, turning(heads, method)))
    torch.testing.assert_close(logits(result.graph.program.module(), inputs), expected, rtol=1e-4, atol=1e-4)
    assert (expected - original(model, inputs)).norm() > 0.01 * expected.norm()


def test_where_keys_are_rotated_by_no_table_cca_says_so() -> None:
    site = captured_decoder("llama")[1].sites[0]
    assert site.k_rotation is not None
    fixed = replace(site, k_rotation=replace(site.k_rotation, tables=()))
    assert CCA().why_not_at(site) == ""
    assert "no table with a row for each token" in CCA().why_not_at(fixed)
    assert Combiner().why_not_at(fixed) == ""


@pytest.mark.parametrize("case", ["dilated-first", "routing", pytest.param("combiner-mean", marks=pytest.mark.full)])
def test_encoders_are_what_the_definition_weighs(case: str) -> None:
    method, weighed = CASES[case]
    model = FAMILIES["bert"].shared()
    result = Pipeline.parse(replace(method, layers=[1])).run(captured("bert", torch.float32))
    inputs = prompt(2, 29, None)
    expected = model_by_hand(model, inputs, 1, False, lambda heads: mixed(heads, weighed(heads, method)))
    torch.testing.assert_close(run(result, ((), inputs))[0], expected, rtol=1e-4, atol=1e-4)


def test_padding_on_any_side_changes_nothing_in_a_model() -> None:
    """Rows of a padded batch give what they give alone."""
    _, graph = captured_decoder("llama")
    both = [replace(CASES[name][0], layers=[layer]) for layer, name in enumerate(("combiner", "cca"))]
    result = Pipeline.parse(both).run(graph)
    program, inputs = result.graph.program.module(), prompt(3, 29, "mixed")
    together = logits(program, inputs)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        ids = inputs["input_ids"][row, mask][None]
        alone = logits(program, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        torch.testing.assert_close(together[row, mask], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("combiner", {"span": 0}),
        ("combiner", {"pool": "median"}),
        ("cca", {"span": 0}),
        ("cca", {"local": 0}),
        ("routing", {"clusters": 0}),
        ("routing", {"window": 0}),
        ("landmark", {"mem_freq": 0}),
        ("landmark", {"top_k": 0}),
        ("dilated", {"step": 0}),
        ("dilated", {"first": -1}),
    ],
)
def test_wrong_parameters_are_said(name: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(BadParameter, match=next(iter(parameters))):
        build_pass(name, parameters)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor made while inside."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.found = max([self.found, *(one.numel() for one in tree_leaves(out) if isinstance(one, Tensor))])
        return out


@pytest.mark.parametrize(
    ("method", "growth"),
    [
        (Dilated(step=2, local=16, sink=4), 2),
        (Combiner(span=64), 2.2),
        (CCA(span=64, local=64), 2.4),
        (Routing(clusters=4, window=16), 2),
    ],
    ids=lambda one: getattr(one, "name", one),
)
def test_no_table_of_all_pairs_is_made(method: Any, growth: float) -> None:
    """Twice the tokens: largest tensors are twice as large, or a little more where summaries are many."""
    sizes = []
    for tokens in (512, 1024):
        heads = drawn(0, tokens, batch=1, kv=1, group=1, size=16)
        with Largest() as largest:
            method.attend(heads)
        sizes.append(largest.found)
    assert sizes[1] <= growth * sizes[0]
    assert sizes[1] < 1024 * 1024 / 2
