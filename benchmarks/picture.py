"""The picture in the manual, docs/where-tokens-went.png: a scene of the digits ViT through a recipe of two methods.

python benchmarks/picture.py [FILE.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

from digits.task import Digits

import tamis

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "where-tokens-went.png"
RECIPE = "evit:keep_ratio=0.6,fuse=false,layers=[1] + tome:keep_ratio=0.7,layers=[2,3]"


def main(path: Path) -> None:
    """Draw it over the old one."""
    task = Digits(8)
    images, _ = task.data(0)
    fast = tamis.compile(task.model, (task.example(),), passes=RECIPE, verify=False)
    fast.draw(path, images, row=2, overwrite=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else PICTURE)
