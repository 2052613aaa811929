"""Loading damaged ONNX files one after the other.

`python onnx_fuzz.py FIRST COUNT SECONDS FOLDER` loads the files that COUNT seeds from FIRST on damage, or as many as it
can in so many seconds (`inf` is all of them), in as much memory as is good for one, and prints what became of them; a
seed stands in FOLDER/seed while it is at work.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onnx_mutations import damaged

MEMORY = 12 * 2**30  # address space, of which torch alone takes several
PATIENCE = 20  # seconds of the processor for one file: what other things the machine does is not the file's fault
EXPORTED = 8  # of so many files that can be read, one is exported as well


class TooSlow(BaseException):
    """A file took longer than PATIENCE."""


def attempt(path: str, export: bool) -> str:
    """What becomes of a file: "evaluated", "exported", or the name of our error; other exceptions are passed on."""
    import torch

    from tamis.capture.export import export_module
    from tamis.capture.onnx.source import load_onnx
    from tamis.errors import TamisError

    try:
        loaded = load_onnx(path)
        if export:
            export_module(loaded.module, loaded.args, {}, dynamic_shapes=loaded.axes, name="m")
            return "exported"
        with torch.no_grad():
            loaded.module(*loaded.args)
    except TamisError as error:
        return type(error).__name__
    return "evaluated"


def main(seeds: Iterable[int], seconds: float, folder: Path) -> dict[str, Any]:
    """Load damaged files for some time: how many became what, and the first seed that went wrong with its traceback."""
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def too_slow(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, too_slow)
    answers: Counter[str] = Counter()
    end, path = time.monotonic() + seconds, folder / "m.onnx"
    for seed in seeds:
        if time.monotonic() > end:
            break
        (folder / "seed").write_text(str(seed))
        path.write_bytes(damaged(seed))
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)
        try:
            answers[attempt(str(path), seed % EXPORTED == 0)] += 1
        except BaseException:
            return {"answers": answers, "seed": seed, "error": traceback.format_exc()}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return {"answers": answers, "seed": None, "error": ""}


if __name__ == "__main__":
    first, count, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    print(json.dumps(main(range(first, first + count), seconds, Path(sys.argv[4]))))
