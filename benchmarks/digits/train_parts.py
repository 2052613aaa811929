"""Train the parts that methods bring along, for the digits ViT, which stays as it is.

    scripts/train_digits_parts [--out DIR]

What a token is worth at a layer is how much of it reaches the class token at the end, by attention rollout (Abnar and
Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, arXiv 2005.00928) in the dense model.

DynamicViT's scorers learn to order tokens by that: cross-entropy of the softmax over the tokens of their scores against
the worth's shares.  The paper trains them end to end through Gumbel samples, together with the backbone.

DTEM's metrics learn which pairs cost least to merge: cross-entropy of the softmax over all pairs of their cosine
against exp(-cost), the cost of a pair being that of a mean in place of both, (a b / (a + b)) |x - y|^2 with the worths
a and b (Ward's criterion).  The paper trains them end to end through a soft merging.

Both learn on the sequences that they make themselves, at a keep ratio drawn for every step.  All is drawn from fixed
seeds and runs on one thread: twice on one machine gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tamis.counts import HALF, CountRule, at_most
from tamis.passes.methods.dynamicvit import scores
from tamis.passes.reduction import quarter_layers

from .model import ARCHITECTURE, HERE, WEIGHTS, trained
from .parts import FACTS
from .scenes import scenes

SEED = 2  # of the scenes; the model itself was trained on others
DEPTH, WIDTH = ARCHITECTURE["depth"], ARCHITECTURE["embed_dim"]
METRIC = 32  # channels of DTEM's metric: a third of the stream's
RATE, WARM_UP = 2e-3, 20
SHARP = 0.1  # temperature of cosines
LEAST = 1e-4  # worth of a token that nothing of reaches the class token
Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Course:
    """How one part is trained: its start, the loss of a step, and the range of keep ratios it sees."""

    start: Callable[[torch.Generator], Parameters]
    loss: Callable[[Any, Parameters, Tensor, list[Tensor], float], Tensor]
    keep: tuple[float, float]
    steps: int
    batch: int = 16


@torch.no_grad()
def worths(model: Any, images: Tensor) -> list[Tensor]:
    """[B, N] per layer, and after the last: the share of each token at the block's input in the class token's end."""
    x, rows = model._pos_embed(model.patch_embed(images)), []
    for block in model.blocks:
        rows.append(attention(block, x).mean(1))
        x = block(x)
    flow = torch.zeros(x.shape[:2])
    flow[:, 0] = 1
    found = [flow]
    for row in reversed(rows):
        flow = (flow + (flow.unsqueeze(1) @ row).squeeze(1)) / 2
        found.append(flow)
    return found[::-1]


def attention(block: Any, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """[B, H, N, N] of a block; bias [B, N] is added to the logits of each key."""
    q, k, _ = heads(block, x)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (logits + (bias if isinstance(bias, float) else bias[:, None, None])).softmax(-1)


def heads(block: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, [B, H, N, D] each."""
    attn = block.attn
    return attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def scorer_start(generator: torch.Generator) -> Parameters:
    """A scorer per stage, as `DynamicViT.expected` has them."""
    sizes = {"in_conv.1": (WIDTH, WIDTH), "out_conv.0": (WIDTH // 2, WIDTH), "out_conv.2": (WIDTH // 4, WIDTH // 2)}
    found: Parameters = {}
    for stage in range(len(quarter_layers(DEPTH))):
        stem = f"score_predictor.{stage}"
        found |= {f"{stem}.in_conv.0.weight": torch.ones(WIDTH), f"{stem}.in_conv.0.bias": torch.zeros(WIDTH)}
        for name, (out, into) in {**sizes, "out_conv.4": (2, WIDTH // 4)}.items():
            found[f"{stem}.{name}.weight"] = torch.randn(out, into, generator=generator) * into**-0.5
            found[f"{stem}.{name}.bias"] = torch.zeros(out)
    return found


def scorer_loss(model: Any, parts: Parameters, images: Tensor, worth: list[Tensor], keep: float) -> Tensor:
    """Mean over stages; each sees what the scores of those before left of the tokens."""
    x, kept, losses = model._pos_embed(model.patch_embed(images)), torch.arange(256).expand(len(images), -1) + 1, []
    for layer, block in enumerate(model.blocks):
        if layer in quarter_layers(DEPTH):
            stem = f"score_predictor.{len(losses)}."
            own = {name.removeprefix(stem): value for name, value in parts.items() if name.startswith(stem)}
            score = scores(x, torch.arange(x.shape[1]).expand(x.shape[:2]) >= 1, own)[:, 1:]
            losses.append(_cross_entropy(worth[layer].gather(1, kept), score))
            best = score.topk(int(256 * keep ** len(losses)), 1).indices
            x = torch.cat([x[:, :1], x.gather(1, best.unsqueeze(-1).expand(-1, -1, WIDTH) + 1)], 1)
            kept = kept.gather(1, best)
        with torch.no_grad():
            x = block(x)
    return torch.stack(losses).mean()


def metric_start(generator: torch.Generator) -> Parameters:
    """A metric per layer, as `DTEM.expected` has them."""
    found: Parameters = {}
    for layer in range(DEPTH):
        found[f"blocks.{layer}.metric.weight"] = torch.randn(METRIC, WIDTH, generator=generator) * WIDTH**-0.5
        found[f"blocks.{layer}.metric.bias"] = torch.zeros(METRIC)
    return found


def metric_loss(model: Any, parts: Parameters, images: Tensor, worth: list[Tensor], keep: float) -> Tensor:
    """Mean over layers; each sees what merging in those before made of the tokens."""
    x, losses = model._pos_embed(model.patch_embed(images)), []
    sizes, slots = torch.ones(x.shape[:2]), torch.arange(x.shape[1]).expand(x.shape[:2])
    for layer, block in enumerate(model.blocks):
        stem = f"blocks.{layer}.metric"
        with torch.no_grad():
            _, _, v = heads(block, x)
            normed = block.norm1(x)
            x = x + block.attn.proj((attention(block, x, sizes.log()) @ v).transpose(1, 2).flatten(2))
        metric = functional.linear(normed, parts[f"{stem}.weight"], parts[f"{stem}.bias"])
        here = torch.zeros_like(sizes).scatter_add_(1, slots, worth[min(layer + 1, DEPTH - 1)]).clamp(min=LEAST)
        a, b = (torch.arange(start, x.shape[1], 2) for start in (2, 1))
        cost = _cost(x[:, a], x[:, b], here[:, a], here[:, b])
        unit = functional.normalize(metric, dim=-1)
        losses.append(_cross_entropy((-cost).exp().flatten(1), (unit[:, a] @ unit[:, b].mT).flatten(1) / SHARP))
        with torch.no_grad():
            rule = CountRule(1, (at_most(int((x.shape[1] - 1) * (1 - keep))), HALF))
            plan = torch.ops.tamis.bipartite_match(metric.detach(), None, rule.out(x.shape[1]), 1, rule.flat())
            x, sizes = torch.ops.tamis.merge_tokens(x, *plan, sizes, False)
            slots = plan[0].gather(1, slots)
            x = x + block.mlp(block.norm2(x))
    return torch.stack(losses).mean()


def _cost(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[B, A, B']: what a mean in place of two tokens costs, in units of what the cheapest twentieth of pairs does."""
    worth = a.unsqueeze(2) * b.unsqueeze(1) / (a.unsqueeze(2) + b.unsqueeze(1))
    cost = worth * torch.cdist(x, y).square()
    return cost / cost.flatten(1).quantile(0.05, dim=1)[:, None, None]


def _cross_entropy(shares: Tensor, logits: Tensor) -> Tensor:
    """Of the softmax over axis 1 against shares, which need not add up to 1; mean over the batch."""
    return -(shares / shares.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()


COURSES = {
    "dynamicvit": Course(scorer_start, scorer_loss, (0.4, 0.95), 250),
    "dtem": Course(metric_start, metric_loss, (0.6, 0.95), 250),
}


def train(model: Any, course: Course, steps: int) -> Iterator[tuple[float, Parameters]]:
    """Train one part; yields the loss of every step and the parameters, which are changed in place."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    parts = {name: nn.Parameter(value) for name, value in course.start(generator).items()}
    optimizer = torch.optim.AdamW(parts.values(), lr=RATE, weight_decay=0.01)
    low, high = course.keep
    for step in range(steps):
        images, _ = scenes("train", SEED, range(step * course.batch, (step + 1) * course.batch))
        keep = low + (high - low) * float(torch.rand((), generator=generator))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARM_UP, (steps - step) / steps)
        loss = course.loss(model, parts, images, worths(model, images), keep)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item(), parts


def save(name: str, parts: Parameters, folder: Path) -> Path:
    """The tensors in half precision under the method's name; methods widen them."""
    from safetensors.torch import save_file

    path = folder / f"{name}.safetensors"
    save_file({key: value.detach().half().contiguous() for key, value in sorted(parts.items())}, path)
    return path


def main() -> None:
    """Train every part; write tensors and how they were made."""
    parser = argparse.ArgumentParser(prog="scripts/train_digits_parts", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the tensors (default: beside the code)")
    parser.add_argument("--only", choices=COURSES, help="train one of them")
    options = parser.parse_args()
    model = trained().requires_grad_(False)
    file = options.out / FACTS.name
    facts = json.loads(file.read_text()) if file.exists() else {}
    for name, course in COURSES.items():
        if options.only not in (None, name):
            continue
        started, losses = time.monotonic(), []
        for done in train(model, course, course.steps):
            losses.append(done[0])
            if len(losses) % 50 == 0:
                mean, seconds = sum(losses[-50:]) / 50, time.monotonic() - started
                print(f"{name}, step {len(losses)}: loss {mean:.4f}, {seconds:.0f} s", flush=True)
        path = save(name, done[1], options.out)
        facts[name] = {
            "command": "scripts/train_digits_parts",
            "steps": course.steps,
            "batch": course.batch,
            "keep_ratios": course.keep,
            "seed": SEED,
            "loss": {"first 50 steps": sum(losses[:50]) / 50, "last 50 steps": sum(losses[-50:]) / 50},
            "seconds": round(time.monotonic() - started),
            "model": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
    file.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
