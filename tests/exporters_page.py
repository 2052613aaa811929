"""docs/exporters.md: `python tests/exporters_page.py` writes its table from a run of all cells (minutes)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from exporter_matrix import cell
from onnx_exports import EXPORTERS
from onnx_models import MODELS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "exporters.md"
BEGIN, END = "<!-- exporters: generated -->", "<!-- end -->"
MODEL_NAMES = {
    "minilm": "all-MiniLM-L6-v2, its own weights",
    "bert": "BERT",
    "bert_v4": "BERT as transformers 4 wrote it",
    "roberta": "RoBERTa",
    "t5": "T5 encoder",
    "vit": "ViT (timm)",
    "dinov2": "DINOv2",
    "clip_vision": "CLIP, vision tower",
    "clip_text": "CLIP, text tower",
    "clip": "CLIP, both towers in one file",
    "whisper": "Whisper encoder",
    "llama": "Llama, prompt",
    "llama_past": "Llama, behind a cache",
}
EXPORTER_NAMES = {
    "dynamo": "dynamo",
    "torchscript11": "TorchScript, opset 11",
    "torchscript13": "opset 13",
    "torchscript": "opset 17",
    "slim": "dynamo, onnxslim",
    "optimized": "TorchScript, ORT optimizer",
    "half": "dynamo, float16",
    "converted": "TorchScript, to float16",
}


def render(page: str, result: Callable[[str, str], str]) -> str:
    """The page with its table made anew from `result(model, exporter)`."""
    lines = [["model", *EXPORTER_NAMES.values()], ["---"] * (1 + len(EXPORTER_NAMES))]
    lines += [[MODEL_NAMES[name], *(result(name, one) for one in EXPORTERS)] for name in MODELS]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", page, flags=re.DOTALL)


def shown(page: str) -> dict[tuple[str, str], str]:
    """What a page says of (model, exporter)."""
    rows = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    names = {text: name for name, text in MODEL_NAMES.items()}
    found = {}
    for row in rows:
        model, *cells = [text.strip() for text in row.strip("|").split("|")]
        found.update({(names[model], one): text for one, text in zip(EXPORTER_NAMES, cells, strict=True)})
    return found


def _run(name: str, exporter: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return cell(name, exporter, Path(folder))


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(), _run))
