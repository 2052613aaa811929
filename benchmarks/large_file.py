"""A large encoder through capture, ToMe and export: peak memory over the file's size, time over torch.onnx.export's.

    python benchmarks/large_file.py
        [--layers 24] [--width 1024]                # of a ViT: 304 million parameters, 1.2 GB
        [--processes 3]
        [--json benchmarks/results/large_file.json]
        --json FILE --docs                          # measures nothing, renders FILE's table into docs/performance.md

Every run is a process of its own, one thread, ways in turn, medians over processes.

torch      torch.onnx.export of the module, dynamic batch, its own choice of files
module     tamis.compile(module, passes="tome:r=8").export(file)
file       the same from one .onnx file that holds its weights (torch.onnx.export made it)
external   the same from an .onnx file with its weights beside it

peak       the largest resident size of the process less that of one that only imports; the weights of the module itself
           and what is mapped from files count
seconds    CPU time from the module, or the path, to the finished file.  With all checks: the result run against the
           original on the example, ONNX's checker, and ONNX Runtime against torch at another batch size
unchecked  verify=False, check=False: all but ONNX's checker is left out
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from speed.cost_tables import large_file
from speed.table import fill

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
WAYS = ("module", "file", "external")
RECIPE = "tome:r=8"


def measure(way: str, folder: Path, layers: int, width: int, *, checked: bool) -> dict[str, float]:
    """One process' figures: CPU seconds, its peak in MB (importing is a part), and the size of what it wrote."""
    import onnxruntime  # noqa: F401 - every way ends up with all of these
    import timm
    import torch

    import tamis

    torch.set_num_threads(1)
    torch.manual_seed(0)  # noqa: TID251 - timm draws weights from the global generator
    result, start = folder / f"{way}.out.onnx", time.process_time()
    if way in ("module", "torch", "prepare"):
        size = {"depth": layers, "embed_dim": width, "num_heads": width // 64}
        model, x = timm.create_model("vit_large_patch16_224", **size).eval(), torch.randn(2, 3, 224, 224)
        start = time.process_time()
        if way == "module":
            tamis.compile(model, (x,), passes=RECIPE, verify=checked).export(result, check=checked)
        elif way == "torch":
            export(model, x, result, external=True)
        else:
            (folder / "external").mkdir()
            export(model, x, folder / "external" / "external.onnx", external=True)
            export(model, x, folder / "file.onnx", external=False)
    elif way in ("file", "external"):
        source = folder / "file.onnx" if way == "file" else folder / "external" / "external.onnx"
        tamis.compile(str(source), passes=RECIPE, verify=checked).export(result, check=checked)
    seconds = time.process_time() - start
    written = [*folder.glob("*.out.onnx*")]
    megabytes = sum(one.stat().st_size for one in written) / 1e6
    for one in written:
        one.unlink()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"seconds": seconds, "peak_mb": peak, "written_mb": megabytes}


def export(model: Any, x: Any, path: Path, *, external: bool) -> None:
    """The plain export, batch dynamic."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = {"x": {0: torch.export.Dim("batch")}}
        shapes = {"dynamo": True, "dynamic_shapes": batch, "opset_version": 18, "external_data": external}
        torch.onnx.export(model, (x,), str(path), verbose=False, **shapes)


def child(way: str, folder: Path, size: tuple[int, int], *, checked: bool = True) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--one", way, str(folder), *map(str, size), str(int(checked))]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=settings)
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(size: tuple[int, int], processes: int) -> dict[str, Any]:
    """A row for each way."""
    runs: dict[tuple[str, bool], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child("prepare", folder, size)
        megabytes = (folder / "file.onnx").stat().st_size / 1e6
        for _ in range(processes):
            for way, checked in [("import", True), ("torch", True), *((w, c) for w in WAYS for c in (True, False))]:
                found = child(way, folder, size, checked=checked)
                runs.setdefault((way, checked), []).append(found)
                print(f"{way}{'' if checked else ', unchecked'}: {found}", flush=True)

    def median(way: str, figure: str, *, checked: bool = True) -> float:
        return statistics.median(run[figure] for run in runs[way, checked])

    imports, plain = median("import", "peak_mb"), median("torch", "seconds")
    rows = {}
    for way in ("torch", *WAYS):
        peak, seconds = median(way, "peak_mb") - imports, median(way, "seconds")
        unchecked = plain if way == "torch" else median(way, "seconds", checked=False)
        rows[way] = {"way": way, "file_mb": megabytes, "import_mb": imports, "peak_mb": peak, "seconds": seconds}
        rows[way] |= {"peak_of_file": peak / megabytes, "time_of_torch": seconds / plain}
        rows[way] |= {"unchecked_of_torch": unchecked / plain, "runs": runs[way, True]}
    return rows


def main() -> None:
    """Measure, print, write; or render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, folder, *numbers = options.one
        layers, width, checked = map(int, numbers)
        print(json.dumps(measure(way, Path(folder), layers, width, checked=bool(checked))))
        return
    if options.docs:
        PAGE.write_text(fill(PAGE.read_text(), json.loads(options.json.read_text()), {"large_file": large_file}))
        return
    import onnxruntime
    import torch

    said = {
        "command": f"python benchmarks/large_file.py --layers {options.layers} --width {options.width}"
        f" --processes {options.processes}",
        "date": datetime.date.today().isoformat(),
        "machine": f"shared {platform.machine()}, no GPU, one thread",
        "versions": f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}",
    }
    measured = measure_all((options.layers, options.width), options.processes)
    rows = {way: {**row, **said} for way, row in measured.items()}
    print(large_file(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
