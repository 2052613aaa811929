"""Classification of held-out scenes by the trained digits ViT."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from .model import trained
from .scenes import scenes

BATCH = 50


class Digits:
    """The task: `score(model, group)` says for each of `count` scenes of series `group` whether the answer is right."""

    def __init__(self, count: int) -> None:
        self.model = trained()
        self.count = count
        self.data = cache(lambda group: scenes("held_out", group, range(count)))

    def example(self) -> torch.Tensor:
        """Two scenes of a series that is not scored."""
        return scenes("train", 0, range(2))[0]

    @torch.inference_mode()
    def score(self, model: Any, group: int = 0) -> dict[str, np.ndarray]:
        """One number per scene, 1 where the largest logit is the label's.  Series 0, 1, 2 ... are all different."""
        images, labels = self.data(group)
        answers = torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])
        return {"accuracy": (answers == labels).numpy().astype(float)}
