"""Train the digits ViT: from small windows around the digit to whole scenes.

    scripts/train_digits_vit [--out DIR]

A window of patches around the digit costs a fraction of the scene and teaches most of what there is to learn; each
patch keeps the position it has in the scene.  The last stage shows whole scenes, so that the model learns where not to
look.  Patches learn beside the class token: those on the digit are to name it, those beside it to name nothing (Jiang
et al., "All Tokens Matter", NeurIPS 2021, arXiv 2104.10858; their head is thrown away).  Matrices of the
blocks are trained by Muon, everything else by AdamW.  All is drawn from fixed seeds and runs on one thread: twice on
one machine gives the same bytes.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from .model import ARCHITECTURE, HERE, save, untrained
from .scenes import CANVAS, Array, as_input, scene, scenes

PATCH = ARCHITECTURE["patch_size"]
GRID = CANVAS // PATCH
NOTHING = ARCHITECTURE["num_classes"]
SEED = 1


@dataclass(frozen=True)
class Stage:
    """`steps` batches of `batch` windows, each `window` x `window` patches that hold the digit."""

    window: int
    steps: int
    batch: int


STAGES = (Stage(7, 1500, 32), Stage(11, 250, 32), Stage(GRID, 300, 16))
ADAM_RATE, MUON_RATE, DECAY = 2e-3, 1.5e-2, 0.05
WARM_UP = 40  # steps; then the rates fall in a straight line


@dataclass(frozen=True)
class Batch:
    """images [B, 1, h, w]; labels [B]; patches [B, n]: numbers in the scene; targets [B, n]: the digit or NOTHING."""

    images: torch.Tensor
    labels: torch.Tensor
    patches: torch.Tensor
    targets: torch.Tensor


class Windows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The batches of all stages, in order."""

    def __init__(self, stages: tuple[Stage, ...]) -> None:
        self.plan = [stage for stage in stages for _ in range(stage.steps)]
        self.first = np.cumsum([0] + [stage.batch for stage in self.plan])

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> Batch:
        window = self.plan[step].window
        made = [scene("train", SEED, index) for index in range(self.first[step], self.first[step + 1])]
        corners = [[_corner(start, one.box[2], window, i) for start in one.box[:2]] for i, one in enumerate(made)]
        patches = np.stack([_square(row, column, window) for row, column in corners])
        images = np.stack(
            [
                one.image[row * PATCH :, column * PATCH :][: window * PATCH, : window * PATCH]
                for one, (row, column) in zip(made, corners, strict=True)
            ]
        )
        targets = np.stack([_targets(p, one.label, *one.box) for p, one in zip(patches, made, strict=True)])
        labels = torch.tensor([one.label for one in made])
        return Batch(as_input(images), labels, torch.from_numpy(patches), torch.from_numpy(targets))


def _corner(start: int, side: int, window: int, varied: int) -> int:
    """First patch of a window that holds the pixels start to start + side - 1 whole; there are several."""
    low = max(0, (start + side - 1) // PATCH - window + 1)
    high = min(start // PATCH, GRID - window)
    return low + varied % (high - low + 1)


def _square(row: int, column: int, window: int) -> Array:
    """Numbers of the patches in a window, [window * window]."""
    return (np.arange(row, row + window)[:, None] * GRID + np.arange(column, column + window)).ravel()


def _targets(patches: Array, label: int, top: int, left: int, side: int) -> Array:
    """The label for patches whose middle lies in the digit's box, NOTHING for the others."""
    y, x = patches // GRID * PATCH + PATCH // 2 - top, patches % GRID * PATCH + PATCH // 2 - left
    return np.where((y >= 0) & (y < side) & (x >= 0) & (x < side), label, NOTHING)


def features(model: Any, images: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Last hidden states [B, 1 + n, C] of windows; on whole scenes, in order, `model.forward_features(images)`."""
    x = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + model.pos_embed[0, 1:][patches]
    first = (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
    return model.norm(model.blocks(torch.cat([first, x], 1)))


def train(model: Any, stages: tuple[Stage, ...] = STAGES, workers: int = 1) -> Iterator[float]:
    """Train `model` in place; yields the loss of the class token after every step."""
    torch.set_num_threads(1)
    model.train()
    patch_head = torch.nn.Parameter(torch.zeros(NOTHING + 1, ARCHITECTURE["embed_dim"]))
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks") and p.dim() == 2]
    others = [p for name, p in model.named_parameters() if not (name.startswith("blocks") and p.dim() == 2)]
    optimizers: list[Any] = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=DECAY, momentum=0.95),
        torch.optim.AdamW([*others, patch_head], lr=ADAM_RATE, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    total = sum(stage.steps for stage in stages)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: _rate(step, total)) for one in optimizers]
    for batch in torch.utils.data.DataLoader(Windows(stages), batch_size=None, num_workers=workers):
        hidden = features(model, batch.images, batch.patches)
        loss = functional.cross_entropy(model.head(hidden[:, 0]), batch.labels)
        named = functional.linear(hidden[:, 1:], patch_head)
        whole = loss + functional.cross_entropy(named.flatten(0, 1), batch.targets.flatten())
        for one in optimizers:
            one.zero_grad()
        whole.backward()
        torch.nn.utils.clip_grad_norm_([*model.parameters(), patch_head], 1.0)
        for one in (*optimizers, *schedules):
            one.step()
        yield loss.item()


def _rate(step: int, total: int) -> float:
    """Factor on the learning rates: up, and down in a straight line."""
    return min((step + 1) / WARM_UP, (total - step) / total)


@torch.inference_mode()
def accuracy(model: Any, seed: int, count: int, batch: int = 50) -> float:
    """Fraction of `count` held-out scenes of a series that any callable model answers rightly."""
    right = 0
    for first in range(0, count, batch):
        images, labels = scenes("held_out", seed, range(first, min(first + batch, count)))
        right += int((model(images).argmax(1) == labels).sum())
    return right / count


def main() -> None:
    """Train, measure on held-out scenes, write weights and configuration."""
    parser = argparse.ArgumentParser(prog="scripts/train_digits_vit", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the weights (default: beside the code)")
    options = parser.parse_args()
    started, losses = time.monotonic(), []
    model = untrained(torch.Generator().manual_seed(SEED))
    for loss in train(model):
        losses.append(loss)
        if len(losses) % 100 == 0:
            mean, seconds = sum(losses[-100:]) / 100, time.monotonic() - started
            print(f"step {len(losses)}: loss {mean:.3f}, {seconds:.0f} s", flush=True)
    facts = {"trained": {"torch": torch.__version__, "machine": platform.machine()}}
    save(model.eval(), facts, options.out)
    print(f"held-out accuracy {accuracy(model, seed=0, count=500):.1%} (500 scenes)")


if __name__ == "__main__":
    main()
