"""Drivers that shorten long prompts, on models for which the part that matters is known."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from decoders import DECODERS, captured
from onnx import helper
from torch import Tensor, nn
from torch.nn.functional import one_hot, scaled_dot_product_attention
from toys_attention import mixing_block

import tamis
from tamis.capture import capture
from tamis.errors import BadParameter, InputMismatch
from tamis.runtime.prompt_models import last_logits, question_attention

WORDS, DOT, NEEDLE, ASK = 12, 1, 7, 9


def text(length: int, needles: list[int], question: int = 3, sentence: int = 5) -> Tensor:
    """Words 2 .. 6 in sentences of one length, needles at some places, a question at the end."""
    ids = 2 + torch.arange(length) % 5
    ids[sentence - 1 :: sentence] = DOT
    ids[needles] = NEEDLE
    return torch.cat([ids, torch.full((question,), ASK)])


def sure_behind_needles(ids: Tensor) -> Tensor:
    """Logits that say word 3 wherever a needle was read, the surer the more of them, and are even elsewhere."""
    return 2 * (ids == NEEDLE).cumsum(1).unsqueeze(-1) * one_hot(torch.tensor(3), WORDS).float()


class TestXL3M:
    def test_the_segment_with_the_needle_is_kept(self) -> None:
        ids = text(100, [57])
        short = tamis.prompts.xl3m(sure_behind_needles, ids, 3, segment=20, overlap=0, keep=1)
        assert short.kept == ((40, 60),)
        assert short.places.tolist() == [*range(40, 60), 100, 101, 102]
        assert torch.equal(short.ids, ids[short.places])
        assert short.scores.argmin() == 2
        torch.testing.assert_close(short.scores[0].exp(), torch.tensor(float(WORDS)), rtol=1e-5, atol=0)

    def test_segments_keep_their_order_and_what_they_share_once(self) -> None:
        ids = text(50, [11, 12, 35])
        short = tamis.prompts.xl3m(sure_behind_needles, ids, 3, segment=10, overlap=4, keep=3, prefix=2, batch=4)
        assert short.kept == ((2, 12), (8, 18), (26, 36))
        assert short.places.tolist() == [0, 1, *range(2, 18), *range(26, 36), 50, 51, 52]
        assert len(short.scores) == 8, "from 2 on every six tokens, and the last ten"

    def test_a_batch_changes_nothing(self) -> None:
        ids = text(64, [20, 50])
        one, many = (tamis.prompts.xl3m(sure_behind_needles, ids, 3, segment=9, overlap=2, batch=b) for b in (1, 5))
        assert torch.equal(one.scores, many.scores)
        assert one.kept == many.kept

    def test_ties_go_to_the_first_segments(self) -> None:
        short = tamis.prompts.xl3m(sure_behind_needles, text(60, []), 3, segment=10, overlap=0, keep=2)
        assert short.kept == ((0, 10), (10, 20))

    def test_a_threshold_drops_unsure_segments_but_never_all(self) -> None:
        ids = text(60, [33])
        for threshold, kept in ((2.4, ((30, 40),)), (0.0, ((30, 40),)), (9.0, ((0, 10), (10, 20), (30, 40)))):
            short = tamis.prompts.xl3m(sure_behind_needles, ids, 3, segment=10, overlap=0, keep=3, threshold=threshold)
            assert short.kept == kept

    def test_one_segment_is_the_prompt(self) -> None:
        ids = text(20, [])
        short = tamis.prompts.xl3m(sure_behind_needles, ids[None], 3, segment=20)
        assert torch.equal(short.ids, ids)

    def test_scores_are_entropies_over_the_question(self) -> None:
        model = DECODERS["llama"].model()
        ids = torch.randint(5, 60, (40,), generator=torch.Generator().manual_seed(0))
        short = tamis.prompts.xl3m(model, ids, 4, segment=12, overlap=0, keep=2)
        for score, start in zip(short.scores, (0, 12, 24), strict=True):
            with torch.no_grad():
                logits = model(torch.cat([ids[start : start + 12], ids[-4:]])[None]).logits[0, -4:]
            p = logits.double().softmax(-1)
            assert abs(score - -(p * p.log()).sum(-1).mean()) < 1e-5

    def test_an_onnx_file(self, tmp_path: Any) -> None:
        onnx.save(counting_file(), tmp_path / "counts.onnx")
        ids = text(100, [57])
        from_file, own = (
            tamis.prompts.xl3m(model, ids, 3, segment=20, overlap=0, keep=1)
            for model in (tmp_path / "counts.onnx", sure_behind_needles)
        )
        assert from_file.kept == own.kept == ((40, 60),)
        torch.testing.assert_close(from_file.scores, own.scores)


def counting_file() -> onnx.ModelProto:
    """`sure_behind_needles` as a file of ids and a mask, which it multiplies by."""
    table = torch.zeros(WORDS, WORDS)
    table[NEEDLE, 3] = 2
    number = onnx.TensorProto.INT64
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["said"]),
        helper.make_node("CumSum", ["said", "axis"], ["sums"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["sums", "column"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "counts",
        [helper.make_tensor_value_info(name, number, ["B", "N"]) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["B", "N", WORDS])],
        [
            onnx.numpy_helper.from_array(table.numpy(), "table"),
            helper.make_tensor("axis", number, [], [1]),
            helper.make_tensor("last", number, [1], [-1]),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


class Finder(nn.Module):
    """One attention whose question looks for needles: ASK's query is NEEDLE's key, all else looks nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WORDS)
        self.ask, self.key = nn.Linear(WORDS, WORDS, bias=False), nn.Linear(WORDS, WORDS, bias=False)
        self.value, self.out = nn.Linear(WORDS, WORDS), nn.Linear(WORDS, WORDS)
        with torch.no_grad():
            self.embed.weight.copy_(torch.eye(WORDS))
            self.ask.weight.zero_()[0, ASK] = 30
            self.key.weight.zero_()[0, NEEDLE] = 1

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (part(x).unsqueeze(1) for part in (self.ask, self.key, self.value))
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return x @ self.embed.weight.T


class TestInfiniRetri:
    def retrieve(self, ids: Tensor, **more: Any) -> Any:
        options = {"separators": DOT, "window": 20, "keep": 1, "phrase": 1, **more}
        return tamis.prompts.infini_retri(Finder().eval(), ids, 3, **options)

    def test_the_sentence_with_the_needle_is_carried_to_the_end(self) -> None:
        ids = text(100, [22])
        short = self.retrieve(ids)
        assert short.kept == ((20, 25),)
        assert short.places.tolist() == [*range(20, 25), 100, 101, 102]
        assert torch.equal(short.ids, ids[short.places])

    def test_needles_of_several_windows_stay_in_order(self) -> None:
        short = self.retrieve(text(100, [6, 48, 81]), keep=3, prefix=2, window=30)
        assert short.kept == ((5, 10), (45, 50), (80, 85))
        assert short.places[:2].tolist() == [0, 1]

    def test_a_window_that_holds_everything_is_one_pass(self) -> None:
        assert self.retrieve(text(100, [22]), window=100).kept == ((20, 25),)
        assert self.retrieve(text(100, [22]), window=100, keep=100).kept[-1] == (95, 100)

    def test_ties_go_to_the_first_tokens(self) -> None:
        assert self.retrieve(text(40, []), window=40).kept == ((0, 5),)

    def test_a_phrase_counts_its_neighbours(self) -> None:
        """Two needles three apart tell more than one, but only where attention is summed over a phrase."""
        ids = text(40, [10, 13, 31])
        scores = self.retrieve(ids, window=40, phrase=4).scores
        assert torch.equal(scores.topk(1).indices, torch.tensor([12])), "tokens 10 .. 13: two before, one after"
        torch.testing.assert_close(scores[12], 2 * scores[31])

    def test_question_tokens_weigh_once_by_their_attention_to_the_question(self) -> None:
        ids = text(20, [7])
        rows = question_attention(Finder().eval(), 3)(ids)[0]
        expected = sum(rows[r, 20:].sum() * rows[r, 7] for r in range(3))
        scores = self.retrieve(ids).scores
        torch.testing.assert_close(scores[7], expected)

    def test_long_sentences_are_cut_and_text_without_separators_is_read(self) -> None:
        short = self.retrieve(text(50, [33]), separators=[0], window=10)
        assert short.kept == ((30, 40),)


def test_rows_of_attention_are_the_last_layers() -> None:
    """The question's rows, against the whole matrix that eager attention returns."""
    model = DECODERS["llama"].model("eager")
    ids = torch.randint(5, 60, (2, 33), generator=torch.Generator().manual_seed(1))
    _, graph = captured("llama")
    rows = question_attention(graph, 5)
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions[-1]
    for one, whole in zip(ids, expected, strict=True):
        torch.testing.assert_close(rows(one), whole[:, -5:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"question": 0}, "question must be a whole number, 1 or more, got 0"),
        ({"question": "3"}, "question must be a whole number, 1 or more, got '3'"),
        ({"keep": 1.5}, "keep must be a whole number, 1 or more, got 1.5"),
        ({"threshold": "low"}, "threshold must be a number or None, got 'low'"),
        ({"question": 21}, "question must be less than the prompt's 20 tokens together with the prefix of 0, got 21"),
        ({"segment": 0}, "segment must be a whole number, 1 or more"),
        ({"overlap": 9, "segment": 9}, "overlap must be between 0 and 8, got 9"),
        ({"ids": torch.zeros(2, 5, dtype=torch.int64)}, r"ids must be token ids \[N\] or \[1, N\], got torch.int64"),
        ({"ids": "What is it?"}, "ids must be numbers, which a tokenizer makes of a text, got str"),
    ],
)
def test_numbers_that_cannot_be_are_said(given: dict[str, Any], said: str) -> None:
    options = {"ids": torch.ones(20, dtype=torch.int64), "question": 3, **given}
    with pytest.raises(BadParameter, match=said):
        tamis.prompts.xl3m(sure_behind_needles, **options)


def test_separators_are_token_ids() -> None:
    with pytest.raises(BadParameter, match=r"separators must be token ids, got '\.'"):
        tamis.prompts.infini_retri(nn.Identity(), text(20, [5]), 3, separators=".")


@pytest.mark.parametrize("model", [nn.Conv2d(3, 3, 1), nn.Embedding(4, 4), lambda ids: ids[:, :, 0], 5])
def test_what_does_not_run_on_the_ids_is_said(model: Any) -> None:
    with pytest.raises(InputMismatch, match="the model must"):
        tamis.prompts.xl3m(model, text(20, [5]), 3, segment=8)


def test_models_without_logits_or_causal_attention_are_refused() -> None:
    with pytest.raises(InputMismatch, match=r"must return logits \[B, N, V\].* got \[1, 4\]"):
        last_logits(lambda ids: ids.float(), torch.ones(1, 4, dtype=torch.int64), 2)
    model = mixing_block()[0].float()
    with pytest.raises(InputMismatch, match="must be causal, without a bias, got a mask of kind 'full'"):
        question_attention(capture(model, (torch.zeros(2, 16, 8),)), 2)


def test_a_window_of_the_last_layer_is_kept() -> None:
    """Mistral's tokens see themselves and four before."""
    _, graph = captured("mistral")
    rows = question_attention(graph, 2)(torch.arange(20) + 5)
    assert (rows[:, 0] > 0).nonzero()[:, 1].unique().tolist() == [14, 15, 16, 17, 18]
    assert (rows[:, 1] > 0).nonzero()[:, 1].unique().tolist() == [15, 16, 17, 18, 19]
