"""Long prompts made short by the model itself: drivers that run it over parts of a prompt and keep what it needs.

Both take a prompt [prefix, context, question] of token ids and return a shorter one, tokens in their order, on which
the model then answers as it would on any prompt (`model.generate(prompt.ids[None])`).  No text, no tokenizer, no cache
that lives on; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..error_text import brief
from ..errors import BadParameter
from ..parameters import check_whole
from .prompt_models import last_logits, question_attention

Range = tuple[int, int]
IDS = "token ids [N] or [1, N]"


@dataclass(frozen=True)
class Prompt:
    """A shortened prompt.

    ids     [n] int64  its token ids
    places  [n] int64  where each of them stands in the long prompt, ascending
    kept    the parts of the context that it holds, (start, stop) in the long prompt, in order
    scores  float32, by which they were chosen: see each driver
    """

    ids: Tensor
    places: Tensor
    kept: tuple[Range, ...]
    scores: Tensor


def xl3m(
    model: Any,
    ids: Tensor | Sequence[int],
    question: int,
    *,
    segment: int = 2048,
    overlap: int | None = None,
    keep: int = 4,
    threshold: float | None = None,
    prefix: int = 0,
    batch: int = 1,
) -> Prompt:
    """Keep the segments of a long context after which the model is surest of how the question goes on.

    The context is cut into segments, each is read alone with the question behind it, and the entropy of the predicted
    next token, -sum p log p in nats, is averaged over the question's tokens: low where the segment tells.  `scores` are
    the entropies of all segments.  A context of one segment stays as it is.  Ties go to the earlier segment.

    Source: Wang et al., "XL3M: A Training-free Framework for LLM Length Extension Based on Segment-wise Inference",
    arXiv 2405.17755 (methods, llm 2.4).  Differs: all segments have one length, so the last one reaches back further
    than `overlap`; tokens that two kept segments share are kept once.

    Args:
        model: a causal language model: a torch module or function of token ids [B, N] with logits [B, N, V], what
            `tamis.compile` and `tamis.load` return, or the path of an .onnx file.
        ids: the whole prompt, [N] or [1, N].
        question: how many tokens at its end are the question.
        segment: tokens of a segment, about what the model was trained on less prefix and question.
        overlap: tokens that neighbouring segments share; a sixteenth of a segment by default.
        keep: segments kept at most.
        threshold: keep only segments whose entropy is at most this, and the best one in any case; None: any.
        prefix: how many tokens at the start stand before every segment (a begin token, instructions).
        batch: segments run at once.

    Raises:
        BadParameter: a number that cannot be.
        InputMismatch: the model needs other inputs than ids, mask and positions, or returns no logits.
    """
    prompt = _Parts.of("prompts.xl3m", ids, question, prefix)
    check_whole("prompts.xl3m", 1, segment=segment, keep=keep, batch=batch)
    overlap = segment // 16 if overlap is None else overlap
    check_whole("prompts.xl3m", 0, overlap=overlap)
    number = threshold is None or (isinstance(threshold, int | float) and threshold == threshold)
    _require(
        "prompts.xl3m",
        overlap=(f"between 0 and {segment - 1}", overlap, overlap < segment),
        threshold=("a number or None", brief(threshold), number),
    )
    if prompt.length <= segment:
        return prompt.having([(0, prompt.length)], torch.zeros(1))
    starts = [*range(0, prompt.length - segment, segment - overlap), prompt.length - segment]
    entropies = [
        _entropy(last_logits(model, torch.stack([prompt.around(range(s, s + segment)) for s in some]), question))
        for some in _batches(starts, batch)
    ]
    scores = torch.cat(entropies)
    order = scores.sort(stable=True).indices[:keep].tolist()
    sure = [i for i in order if threshold is None or scores[i] <= threshold] or order[:1]
    return prompt.having([(starts[i], starts[i] + segment) for i in sorted(sure)], scores)


def infini_retri(
    model: Any,
    ids: Tensor | Sequence[int],
    question: int,
    *,
    separators: int | Iterable[int],
    window: int = 1024,
    keep: int = 300,
    phrase: int = 8,
    prefix: int = 0,
) -> Prompt:
    """Read a long context window by window, and carry along the sentences that the question attends to.

    Each window of new sentences is read with the sentences kept so far before it and the question behind.  In the last
    layer, heads summed, every question token's attention to the context is summed over `phrase` neighbouring tokens and
    weighted by the attention that this question token pays to the question.  Sentences that hold one of the `keep` best
    tokens are kept whole.  `scores` [context] are those of each token in the window in which it was new.  Ties go to
    the earlier token.  A window that holds everything is one pass, and chooses too.

    Only the question's rows of the last attention are computed, [heads, question, N]; the model runs up to there.

    Source: Ye et al., "Infinite Retrieval: Attention Enhanced LLMs in Long-Context Processing", arXiv 2502.12962
    (methods, llm 2.5).  Differs: the published code multiplies by the weights of the question tokens twice, and keeps
    those of the first window for all; here they enter once, each window's own.

    Args:
        model: a causal language model: a torch module in eval mode, a captured `TokenGraph`, what `tamis.compile`
            returned, or a path or name that `tamis.compile` takes; attention must be causal without a bias.
        ids: the whole prompt, [N] or [1, N].
        question: how many tokens at its end are the question.
        separators: the token id, or ids, that end a sentence.
        window: new tokens read at once, at most; a sentence longer than that is cut.
        keep: tokens of highest score whose sentences are kept.
        phrase: tokens over which attention is summed, about as many as an answer has.
        prefix: how many tokens at the start stand before every window (a begin token, instructions).

    Raises:
        BadParameter: a number that cannot be.
        InputMismatch: the model needs other inputs than ids, mask and positions, or its last attention is no causal
            attention over its tokens.
    """
    prompt = _Parts.of("prompts.infini_retri", ids, question, prefix)
    check_whole("prompts.infini_retri", 1, window=window, keep=keep, phrase=phrase)
    ends = _token_ids(separators)
    attention = question_attention(model, question)
    sentences = list(_sentences(prompt.context.tolist(), ends, window))
    owner = torch.repeat_interleave(torch.tensor([stop - start for start, stop in sentences], dtype=torch.int64))
    scores = torch.zeros(prompt.length)
    kept = torch.empty(0, dtype=torch.int64)
    for start, stop in _windows(sentences, window):
        read = torch.cat([kept, torch.arange(start, stop)])
        rows = attention(prompt.around(read)).sum(0)  # [question, prefix + read + question]
        found = _phrase_scores(rows, prefix, len(read), phrase)
        scores[start:stop] = found[len(kept) :]
        best = found.sort(descending=True, stable=True).indices[:keep]
        kept = read[torch.isin(owner[read], owner[read[best]])]
    chosen = sorted(set(owner[kept].tolist()))
    return prompt.having([sentences[i] for i in chosen], scores)


@dataclass(frozen=True)
class _Parts:
    """A prompt in its three parts, [.] int64 on the CPU; places count from the start of the context."""

    prefix: Tensor
    context: Tensor
    question: Tensor

    @staticmethod
    def of(where: str, ids: Tensor | Sequence[int], question: int, prefix: int) -> _Parts:
        found = _read(where, ids)
        flat = found.reshape(-1).to(torch.int64)
        one = found.ndim == 1 or (found.ndim == 2 and found.shape[0] == 1)
        whole = not found.is_floating_point() and found.dtype != torch.bool
        _require(where, ids=(IDS, f"{found.dtype} {list(found.shape)}", one and whole))
        check_whole(where, 1, question=question)
        check_whole(where, 0, prefix=prefix)
        stop = len(flat) - question
        rule = f"less than the prompt's {len(flat)} tokens together with the prefix of {prefix}"
        _require(where, question=(rule, question, stop > prefix))
        return _Parts(flat[:prefix], flat[prefix:stop], flat[stop:])

    @property
    def length(self) -> int:
        """Tokens of the context."""
        return len(self.context)

    def around(self, read: Tensor | range) -> Tensor:
        """Token ids of prefix, some of the context, and question."""
        places = torch.as_tensor(read, dtype=torch.int64)
        return torch.cat([self.prefix, self.context[places], self.question])

    def having(self, kept: list[Range], scores: Tensor) -> Prompt:
        """The prompt with only these parts of its context; what two of them share once."""
        before, total = len(self.prefix), len(self.prefix) + self.length
        held = torch.zeros(self.length, dtype=torch.bool)
        for start, stop in kept:
            held[start:stop] = True
        read = held.nonzero().squeeze(1)
        places = torch.cat([torch.arange(before), read + before, torch.arange(total, total + len(self.question))])
        ranges = tuple((start + before, stop + before) for start, stop in kept)
        return Prompt(self.around(read), places, ranges, scores.float())


def _read(where: str, ids: Any) -> Tensor:
    try:
        return torch.as_tensor(ids).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        rule = "numbers, which a tokenizer makes of a text" if isinstance(ids, str) else IDS
        hint = f"see help(tamis.{where})."
        raise BadParameter(where=where, name="ids", rule=rule, got=type(ids).__name__, hint=hint) from None


def _require(where: str, **rules: tuple[str, Any, bool]) -> None:
    for name, (rule, got, holds) in rules.items():
        if not holds:
            raise BadParameter(where=where, name=name, rule=rule, got=got, hint=f"see help(tamis.{where}).")


def _token_ids(separators: Any) -> set[int]:
    """Separators as a set; those that are no token ids, a full stop for instance, would end no sentence."""
    separators = separators.flatten().tolist() if isinstance(separators, Tensor) else separators
    found = [separators] if isinstance(separators, str) or not isinstance(separators, Iterable) else list(separators)
    odd = [repr(one) for one in found if isinstance(one, bool) or not isinstance(one, Integral)]
    if odd:
        hint = "tokenizer.convert_tokens_to_ids says the id of a token."
        raise BadParameter(where="prompts.infini_retri", name="separators", rule="token ids", got=odd[0], hint=hint)
    return set(map(int, found))


def _batches(starts: list[int], size: int) -> Iterator[list[int]]:
    return (starts[i : i + size] for i in range(0, len(starts), size))


def _entropy(logits: Tensor) -> Tensor:
    """Mean entropy over positions, in nats: logits [B, q, V] -> [B] float32."""
    logs = logits.float().log_softmax(-1)
    return torch.special.entr(logs.exp()).sum(-1).mean(-1).cpu()


def _sentences(ids: list[int], ends: set[int], longest: int) -> Iterator[Range]:
    """Parts that end with a separator, or after `longest` tokens."""
    start = 0
    for place, token in enumerate(ids, 1):
        if token in ends or place - start == longest or place == len(ids):
            yield start, place
            start = place


def _windows(sentences: list[Range], most: int) -> Iterator[Range]:
    """Runs of whole sentences of at most `most` tokens."""
    start, end = sentences[0]
    for first, stop in sentences[1:]:
        if stop - start > most:
            yield start, end
            start = first
        end = stop
    yield start, end


def _phrase_scores(rows: Tensor, prefix: int, context: int, phrase: int) -> Tensor:
    """Score of each context token [context] from the question's attention to all, rows [question, N]."""
    to_context = rows[:, prefix : prefix + context]
    summed = pad(to_context, (phrase // 2, (phrase - 1) // 2)).unfold(1, phrase, 1).sum(-1)
    weight = rows[:, prefix + context :].sum(1, keepdim=True)
    return (weight * summed).sum(0)
