"""Every token reduction on ViT-small at 80, 60 and 40% of the FLOPs: drift and speed, beside what it keeps on digits.

    python benchmarks/vision_table.py [--methods tome,evit] [--levels 80,60,40]
        [--what drift,eager,inductor,onnxruntime] [--seconds 10] [--rounds 5] [--again]
    python benchmarks/vision_table.py --render

A cell is one method at one level: its `drift` (with the recipe that reaches the level), or its speed in one back end.
Each is written to results/vision.json as soon as it is there, so a run that stops keeps what it has and the next one
goes on; --again measures anew.  Accuracy is that of `accuracy.py`.  The page is docs/methods.md.

vit_small_patch16_224 of timm, random weights (seed 0), random images (seed 0), batch 8, one thread, float32.  Dense
and reduced run in turn in random order; a speed-up is the median over rounds of the ratio of their CPU times.  Inductor
runs mode "default".  Methods with trained parts get random ones here, which time alike; their drift is not shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

from accuracy import HERE, facts, results

RESULT, PAGE = HERE / "results" / "vision.json", HERE.parent / "docs" / "methods.md"
LEVELS = (80, 60, 40)  # per cent of the dense model's FLOPs
WHAT = ("drift", "eager", "inductor", "onnxruntime")
MODEL, BATCH = "vit_small_patch16_224", 8
PACKAGES = ("torch", "timm", "onnxruntime")


class Subject:
    """The dense model and what is made of it once for all methods."""

    def __init__(self) -> None:
        import timm
        import torch

        from tamis.runtime.api import prepare

        torch.set_num_threads(1)
        torch.manual_seed(0)  # noqa: TID251 - timm draws weights from the global generator
        self.model = timm.create_model(MODEL).eval()
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(BATCH, 3, 224, 224, generator=generator)
        self.prepared = prepare(self.model, (self.images[:2],))
        self.folder = tempfile.TemporaryDirectory()
        self.channels, self.depth = self.model.embed_dim, len(self.model.blocks)
        self._dense: dict[str, Any] = {"eager": self.model}

    @cached_property
    def logits(self) -> Any:
        """What the dense model answers."""
        return self.prepared.graph.program.module()(self.images)

    def dense(self, backend: str) -> Any:
        """The dense model in a back end."""
        if backend not in self._dense:
            self._dense[backend] = self._compiled() if backend == "inductor" else self._in_onnx()
        return self._dense[backend]

    def reduced(self, backend: str, method: Any) -> Any:
        """The reduced model in a back end."""
        from speed.variants import onnx_session

        from tamis.rewrite import Pipeline
        from tamis.runtime.api import Options, build

        mode = "default" if backend == "inductor" else None
        model = build(self.prepared, Pipeline((method,)), Options(mode=mode), verify=False)
        if backend != "onnxruntime":
            return model
        path = Path(self.folder.name) / f"{method.name}.onnx"
        return onnx_session(Path(model.export(path, check=False, overwrite=True)))

    def _compiled(self) -> Any:
        import torch

        return torch.compile(self.model)

    def _in_onnx(self) -> Any:
        import torch
        from speed.variants import Batched, onnx_session

        path = Path(self.folder.name) / "dense.onnx"
        dynamic = {"x": {0: torch.export.Dim("batch")}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            example = (self.images[:2],)
            torch.onnx.export(
                Batched(self.model), example, dynamo=True, dynamic_shapes=dynamic, opset_version=18, verbose=False
            ).save(path)
        return onnx_session(path)


def recipe(subject: Subject, cls: Any, level: int) -> tuple[Any, Any]:
    """The method that comes nearest to the level, its extent being in hundredths, and its compiled model."""
    from reductions import compiled, extent, nearest_to
    from untrained import untrained

    def make(share: float) -> Any:
        return untrained(cls, subject.channels, subject.depth, **extent(cls, share, subject.depth))

    method = nearest_to(make, subject.prepared, level / 100)
    return method, compiled(subject.prepared, method)


def drift(subject: Subject, method: Any, model: Any) -> dict[str, Any]:
    """How far the logits move, and those of the control: relative L2 and cosine, means over the images."""
    import torch
    from reductions import compiled, control_of, flops_share, is_control

    from tamis.weights import TrainedPass

    cell: dict[str, Any] = {
        "pass": shown(method),
        "tokens": [layer.tokens_out for layer in model.report.layers],
        "flops": flops_share(model),
    }
    if isinstance(method, TrainedPass):
        return {**cell, "trained": True}
    with torch.inference_mode():
        cell["moved"] = moved(subject.logits, model(subject.images))
        if not is_control(method):
            cell["control"] = moved(subject.logits, compiled(subject.prepared, control_of(method, 0))(subject.images))
    return cell


def shown(method: Any) -> str:
    """The recipe without the names of random tensors."""
    return ",".join(part for part in str(method).split(",") if "tensors@" not in part)


def moved(expected: Any, got: Any) -> dict[str, float]:
    """Relative L2 and cosine of logits [B, classes], means over the rows."""
    import torch

    relative = (got - expected).norm(dim=1) / expected.norm(dim=1)
    return {"relative_l2": relative.mean().item(), "cosine": torch.cosine_similarity(got, expected).mean().item()}


def speed(subject: Subject, method: Any, backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """Dense against reduced in one back end, side by side."""
    import torch
    from token_reduction import interleaved

    variants = {"dense": subject.dense(backend), "reduced": subject.reduced(backend, method)}
    with torch.inference_mode():
        times = interleaved(variants, subject.images, options.seconds, options.rounds)
    ratios = [a / b for a, b in zip(times["dense"], times["reduced"], strict=True)]
    return {
        "speedup": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "dense_ms": 1e3 * statistics.median(times["dense"]),
        "rounds": len(ratios),
    }


def measure(options: argparse.Namespace) -> None:
    """Every cell asked for that is not there yet; each is written at once."""
    from reductions import methods

    from tamis.errors import TamisError

    subject = Subject()
    for level in options.levels:
        for cls in methods():
            wanted = [w for w in options.what if options.again or key(cls.name, level, w) not in cells()]
            if not wanted or (options.methods and cls.name not in options.methods):
                continue
            try:
                method, model = recipe(subject, cls, level)
            except TamisError as error:
                keep(key(cls.name, level, "drift"), {"refused": " ".join(str(error).split())}, options)
                continue
            for what in wanted:
                found = drift(subject, method, model) if what == "drift" else speed(subject, method, what, options)
                keep(key(cls.name, level, what), found, options)


def key(method: str, level: int, what: str) -> str:
    """The name of a cell."""
    return f"{method}/{level}/{what}"


def cells() -> dict[str, Any]:
    """All cells there are."""
    return json.loads(RESULT.read_text()) if RESULT.exists() else {}


def keep(name: str, cell: dict[str, Any], options: argparse.Namespace) -> None:
    """Write one cell with what is needed to repeat it."""
    method, level, what = name.split("/")
    extent = f" --seconds {options.seconds:g} --rounds {options.rounds}" if what != "drift" else ""
    words = f"--methods {method} --what {what} --levels {level}{extent}"
    found = {**cells(), name: {**cell, "run": facts(f"python benchmarks/vision_table.py {words}", PACKAGES)}}
    RESULT.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    print(name, json.dumps(cell), flush=True)


def main() -> None:
    """Measure what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = {"type": lambda text: [word for word in text.split(",") if word]}
    parser.add_argument("--methods", default=[], help="names with commas between them (default: all)", **listed)
    parser.add_argument("--what", default=list(WHAT), help=f"of {','.join(WHAT)}", **listed)
    parser.add_argument("--levels", default=list(LEVELS), type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--seconds", type=float, default=10, help="of rounds per cell (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="at most (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure cells that are there already")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the page from the results")
    options = parser.parse_args()
    from vision_page import rendered

    if not options.render:
        measure(options)
    PAGE.write_text(rendered(PAGE.read_text(), cells(), results()))


if __name__ == "__main__":
    main()
