"""Train A-ViT's gates for the digits ViT, which itself stays as it is.

    scripts/train_digits_gates [--out DIR]

A-ViT trains the whole model with its gates (methods card 10.2), and its tokens learn when to stop from a penalty alone.
Here the model is fixed, so that every method in the tables prunes the same one, and gates must learn from its answers:
a token that stopped is hidden as it will be (0.99 reached), and gradients pass the step as if it were hidden by as much
as it is done (straight-through, Bengio et al., arXiv 1308.3432).  The loss is the cross-entropy of the answer and a
price for every token at every block.  All is drawn from fixed seeds and runs on one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .model import HERE, trained
from .scenes import scenes

SEED = 2  # of scenes that the model's own training did not draw
STEPS, BATCH = 240, 16
RATE, PRICE, FIRST_BIAS = 2e-2, 0.6, -3.0
DONE = 0.99


def attention(attn: Any, x: Tensor, seen: Tensor) -> Tensor:
    """Attention over x [B, N, C] whose keys count as much as they are seen [B, N]."""
    batch, count, _ = x.shape
    q, k, v = attn.qkv(x).reshape(batch, count, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    logits = attn.q_norm(q) @ attn.k_norm(k).transpose(2, 3) * attn.scale
    each = (logits - logits.amax(3, keepdim=True).detach()).exp() * seen[:, None, None]
    rows = each / each.sum(3, keepdim=True)
    return attn.proj((rows @ v).transpose(1, 2).reshape(batch, count, -1))


def halted(model: Any, images: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, 10], and the share of patches seen after each block but the last [L - 1].

    weight [L - 1, C] and bias [L - 1] are the gates.
    """
    x = model._pos_embed(model.patch_embed(images))
    seen = torch.ones(x.shape[:2])
    done, mean, shares = torch.zeros(x.shape[:2]), torch.zeros_like(x[:, 0]), []
    for layer, block in enumerate(model.blocks):
        x = x + attention(block.attn, block.norm1(x), seen)
        x = x + block.mlp(block.norm2(x))
        last = layer == len(model.blocks) - 1
        halting = torch.ones_like(done) if last else functional.linear(x, weight[layer], bias[layer]).sigmoid()
        before, done = done, done + halting
        stop = (done[:, 0] > DONE) & (before[:, 0] <= DONE)
        share = torch.where(stop, 1 - before[:, 0], halting[:, 0]) * (before[:, 0] <= DONE)
        mean = mean + share[:, None] * x[:, 0]
        soft = (1 - done).clamp(min=0)
        hard = (done <= DONE).float()
        seen = torch.cat([torch.ones_like(soft[:, :1]), (hard + soft - soft.detach())[:, 1:]], 1)
        shares += [] if last else [seen[:, 1:].mean()]
    return model.head(model.norm(mean)), torch.stack(shares)


def train(model: Any, steps: int = STEPS, batch: int = BATCH) -> Iterator[tuple[dict[str, Tensor], float, float]]:
    """Train gates for a model that is not changed; yields after every step the gates, the loss and the share seen."""
    torch.set_num_threads(1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers, width = len(model.blocks) - 1, model.embed_dim
    weight = torch.zeros(layers, width, requires_grad=True)
    bias = torch.full((layers,), FIRST_BIAS, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=RATE)
    for step in range(steps):
        images, labels = scenes("train", SEED, range(step * batch, (step + 1) * batch))
        for group in optimizer.param_groups:
            group["lr"] = RATE * (steps - step) / steps
        logits, shares = halted(model, images, weight, bias)
        loss = functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        (loss + PRICE * shares.mean()).backward()
        optimizer.step()
        yield {"gate.weight": weight.detach(), "gate.bias": bias.detach()}, loss.item(), shares.mean().item()


def main() -> None:
    """Train and write `avit.safetensors`, with the facts of the training beside it."""
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(prog="scripts/train_digits_gates", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the weights (default: beside the code)")
    options = parser.parse_args()
    started, done = time.monotonic(), []
    for one in train(trained()):
        done.append(one)
        if len(done) % 20 == 0:
            means = [sum(column) / 20 for column in list(zip(*done[-20:], strict=True))[1:]]
            seconds = time.monotonic() - started
            print(f"step {len(done)}: loss {means[0]:.3f}, tokens seen {means[1]:.2f}, {seconds:.0f} s", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(done[-1][0], options.out / "avit.safetensors")
    facts = {"steps": STEPS, "batch": BATCH, "price": PRICE, "torch": torch.__version__, "machine": platform.machine()}
    (options.out / "avit.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
