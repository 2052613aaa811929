"""Methods that read far keys at other positions, in captured decoders, against attention written out pair by pair."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from decoders import DECODERS, Decoder, captured, prompt
from sparse_oracle import attended, drawn, expanded, fixture, recall
from torch import Tensor
from two_angles_oracle import TwoPositions, attending, remembered, sinks

import tamis
from tamis.capture import capture
from tamis.errors import NothingChanged
from tamis.graph import Rotation, TokenGraph
from tamis.passes.methods.infllm import InfLLM
from tamis.passes.methods.lm_infinite import LMInfinite
from tamis.passes.methods.streaming_llm import StreamingLLM
from tamis.rewrite import Pipeline

SIZES = DECODERS["llama"].options
ROPE = {"rope_theta": 10000.0}
PARTLY = {"head_dim": 16, "rope_parameters": {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.5}}
SCALED = {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0}}
ALL_FULL = {**DECODERS["gemma2"].options, "layer_types": ["full_attention"] * 2}
MORE = [
    Decoder("partly rotated", "Phi3Config", {**SIZES, **PARTLY}, 2, 0.25),
    Decoder("scaled tables", "LlamaConfig", {**SIZES, **SCALED}, 2, 12**-0.5),
    Decoder("capped", "Gemma2Config", ALL_FULL, 2, 0.25, softcap=4.0),
]
NAMES = ["llama", "qwen2", "qwen3", "phi3", "mistral", *(one.name for one in MORE)]


@cache
def decoder(name: str) -> tuple[Any, TokenGraph]:
    if name in DECODERS:
        return captured(name)
    model = next(one for one in MORE if one.name == name).model()
    return model, capture(model, kwargs=prompt(2, 12, "left"))


CASES = {
    "lm-infinite": (LMInfinite(sink=3, local=9), TwoPositions(9, sinks(3), 9, True)),
    "farther": (LMInfinite(sink=3, local=9, distance=14), TwoPositions(9, sinks(3), 14, True)),
    "narrow": (LMInfinite(sink=3, local=2), TwoPositions(2, sinks(3), 2, True)),
    "middle": (
        LMInfinite(sink=3, local=9, middle=4, last=2),
        TwoPositions(9, sinks(3), 9, True, middle=4, middle_at=4, last=2),
    ),
    "blocks": (
        InfLLM(sink=2, local=6, blocks=2, block=3, stand_ins=2, chunk=3),
        TwoPositions(6, remembered(2, 6, 2, 3, 2, 3), 5, True),
    ),
    "slots": (StreamingLLM(sink=3, local=9, positions="slot"), TwoPositions(9, sinks(3), 11, False)),
}


def some(pairs: list[Any]) -> list[Any]:
    """Arguments of tests, of which those whose last entry is false belong to the full matrix."""
    return [pytest.param(*one) if chosen else pytest.param(*one, marks=pytest.mark.full) for *one, chosen in pairs]


QUICK = [
    ("llama", "lm-infinite"),
    ("partly rotated", "blocks"),
    ("capped", "slots"),
    ("mistral", "narrow"),
    ("qwen2", "middle"),
]


def answered(program: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        out = program(**inputs, **more)
    return (out.logits if hasattr(out, "logits") else out[0])[inputs["attention_mask"].bool()]


def original(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return answered(model, inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0))


@pytest.mark.parametrize(
    ("name", "case"),
    some([(name, case, (name, case) in QUICK) for name in NAMES for case in CASES]),
)
def test_decoders_equal_pairs_written_out(name: str, case: str) -> None:
    model, graph = decoder(name)
    method, how = CASES[case]
    program = Pipeline.parse(method).run(graph).graph.program.module()
    for batch, length in ((2, 33), (3, 24)):
        inputs = prompt(batch, length, "mixed")
        with attending(model, how, inputs["attention_mask"]):
            expected = original(model, inputs)
        torch.testing.assert_close(answered(program, inputs), expected, rtol=1e-4, atol=1e-4)
    plain = Pipeline.parse(f"a-shape:sink={method.sink},local={method.local}").run(graph).graph.program.module()
    if name != "mistral" or case == "narrow":  # in the others its window holds near keys alone
        assert (answered(plain, inputs) - expected).norm() > 1e-3 * expected.norm(), "positions matter"


@pytest.mark.parametrize("case", some([(case, case == "blocks") for case in CASES]))
def test_prompts_within_the_window_are_dense(case: str) -> None:
    model, graph = decoder("llama")
    program = Pipeline.parse(CASES[case][0]).run(graph).graph.program.module()
    for length in (1, 2 if case == "narrow" else 6):
        inputs = prompt(3, length, "mixed")
        torch.testing.assert_close(answered(program, inputs), original(model, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", some([(case, case == "farther") for case in CASES]))
def test_later_tokens_change_nothing(case: str) -> None:
    """A prompt's first 21 tokens, whole chunks of them, are answered as in the prompt of those alone.

    But for the last ones, where those read more.
    """
    _, graph = decoder("llama")
    program = Pipeline.parse(CASES[case][0]).run(graph).graph.program.module()
    whole = prompt(2, 33, None)
    some_of_it = {name: x[:, :21] for name, x in whole.items()}
    got, alone = (answered(program, inputs).unflatten(0, (2, -1)) for inputs in (whole, some_of_it))
    same = 21 - CASES[case][1].last * (CASES[case][1].middle > 0)
    torch.testing.assert_close(got[:, :same], alone[:, :same], rtol=1e-4, atol=1e-4)
    assert same == 21 or (got[:, same:21] - alone[:, same:]).abs().max() > 1e-3


def test_rows_add_up_to_one_and_follow_the_mask() -> None:
    """The card's example, where nothing is rotated: what slots do to positions is in no logit."""
    heads = fixture()
    method = StreamingLLM(sink=2, local=4, positions="slot")
    torch.testing.assert_close(
        method.attend(heads)[0, 0, 15], torch.tensor([0.3254, 1.0397, 1.7540, -1.6542]).double(), atol=1e-4, rtol=0
    )
    assert recall(heads, expanded(method.index(heads), heads))[0, 0, 15].item() == pytest.approx(0.4243, abs=1e-4)
    ones = replace(heads, values=torch.ones_like(heads.values))
    for one in (method, LMInfinite(sink=2, local=4)):
        torch.testing.assert_close(one.attend(ones), torch.ones_like(heads.queries))


def test_all_from_the_middle_is_dense_for_the_last() -> None:
    """Where nothing is rotated, and padded rows have last tokens of their own."""
    heads, plain = drawn(1, 50, lengths=[50, 31]), LMInfinite(sink=2, local=8)
    got = replace(plain, middle=50, last=3).attend(heads)
    torch.testing.assert_close(replace(plain, last=3).attend(heads), plain.attend(heads))
    for row, end in enumerate((50, 31)):
        dense = attended(heads)[row, :, end - 3 : end]
        torch.testing.assert_close(got[row, :, end - 3 : end].double(), dense, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[row, :, : end - 3], plain.attend(heads)[row, :, : end - 3])
    assert (got[1, :, 31:] == 0).all()
    short = drawn(2, 2)
    torch.testing.assert_close(replace(plain, middle=5, last=4).attend(short), plain.attend(short))


def test_the_middle_is_the_best_of_each_head_and_the_first_of_equals() -> None:
    """The fixture's last token: what it reads of tokens 2 to 11."""
    heads = replace(fixture(), values=torch.eye(16).double()[None, None])
    method = LMInfinite(sink=2, local=4, middle=2)
    read = method.attend(heads)[0, :, 15] != 0
    logits = (heads.queries[0, :, 15] @ heads.keys[0, 0].T)[:, 2:12]
    assert torch.equal(read[:, 2:12], torch.zeros(2, 10).scatter(1, logits.topk(2).indices, 1.0).bool())
    equal = replace(heads, keys=torch.ones_like(heads.keys))
    assert method.attend(equal)[0, 0, 15].nonzero().flatten().tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    windowed = method.attend(replace(equal, window=10))[0, 0, 15]
    assert windowed.nonzero().flatten().tolist() == [6, 7, 12, 13, 14, 15]


def test_blocks_of_the_card_s_example() -> None:
    """The last token looks up two blocks, whose stand-ins in head 0 are tokens 3 and 4, and 7 and 8."""
    heads, method = fixture(), InfLLM(sink=2, local=4, blocks=1, block=4, stand_ins=2, chunk=1)
    far, lse = method.far(heads), method.near(heads)[1]
    stood_for = method.stand_in(heads, far, lse)[0, 0]  # [M, heads, D]
    keys = heads.keys[0, 0].float()
    torch.testing.assert_close(stood_for[0], torch.stack([keys[[3, 4]].mean(0), keys[[2, 5]].mean(0)]))
    scores = method.scores(heads, far, lse)[0, :, 15].sum(0)
    torch.testing.assert_close(scores[:2], torch.tensor([-1.7411, 2.1250]), atol=1e-4, rtol=0)
    tiles = method.index(heads).tiles
    assert tiles is not None
    assert tiles[0, 0, 15].tolist() == [6, 10]


def test_models_without_rotary_embedding_are_refused() -> None:
    _, graph = captured("gpt2")
    for passes in ("lm-infinite", "streaming-llm:positions=slot"):
        with pytest.raises(NothingChanged, match="no rotary position embedding was found"):
            Pipeline.parse(passes).run(graph)
    assert Pipeline.parse("streaming-llm").run(graph).changed


def test_tables_without_a_row_for_each_token_are_refused_where_they_matter() -> None:
    _, graph = captured("llama")
    site = replace(graph.sites[0], k_rotation=Rotation("keys"))
    assert "no table with a row for each token" in StreamingLLM(positions="slot").why_not_at(site)
    assert StreamingLLM().why_not_at(site) == ""


def test_some_heads_rotate_their_own() -> None:
    heads = drawn(0, 5)
    rotated = {"queries": heads.queries + 1, "keys": heads.keys + 2}
    some_heads = replace(heads, _rotate=lambda what, places: rotated[what]).of([1, 2, 3])
    place = torch.arange(5)
    assert torch.equal(some_heads.queries_at(place), rotated["queries"][:, 1:])
    assert torch.equal(some_heads.keys_at(place), rotated["keys"][:, [0, 1, 1]])


@pytest.mark.parametrize(
    "passes",
    some(
        [
            ("infllm:sink=2,local=6,blocks=2,block=3,stand_ins=2,chunk=3,layers=[0]", True),
            ("lm-infinite:sink=3,local=9,middle=3,last=2", False),
            ("streaming-llm:sink=3,local=9,positions=slot", False),
            ("hip:sink=2,local=6,chunks=[8,4],keeps=[16,8],strides=[2,1],block=8", False),
        ]
    ),
)
def test_exported_files_answer_the_same(passes: str, tmp_path: Any) -> None:
    model, _ = decoder("llama")
    fast = tamis.compile(model, kwargs=prompt(2, 20, "left"), passes=passes)
    fast.export(tmp_path / "sparse.onnx")
    loaded, other = tamis.load(tmp_path / "sparse.onnx"), prompt(3, 37, "mixed")
    real = other["attention_mask"].bool()
    torch.testing.assert_close(loaded(**other)["logits"][real], answered(fast, other), rtol=1e-4, atol=1e-4)
