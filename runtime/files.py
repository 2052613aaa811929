"""Output files: what is in the way is found before work starts, and what is written is written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OutputExists, OutputNotWritable, UnknownOutputFormat
from ..parameters import path_text

DIRECTORY_FILES = ("model.onnx", "model.onnx.data", "model.pt2", "recipe.yaml", "report.json", "kernels.json")
# Files beside a model without which it cannot be used: configuration, tokenizer, preprocessor.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


@dataclass(frozen=True)
class Output:
    """Where the result goes.  kind: "onnx", "pt2" or "directory"."""

    path: Path
    kind: str

    @staticmethod
    def of(text: str | None, source: str) -> Output:
        """Read `-o`; None gives `{stem}-tamis.onnx` in the current directory.  Raises UnknownOutputFormat."""
        if text is None:
            return Output(Path(f"{stem_of(source)}-tamis.onnx"), "onnx")
        kind = kind_of(text)
        if kind is None:
            raise UnknownOutputFormat(path=text)
        return Output(Path(text), kind)

    def check(self, overwrite: bool) -> None:
        """Raise OutputExists or OutputNotWritable if this cannot be written; leaves everything as it is."""
        if self.kind != "directory":
            check_file(self.path, overwrite)
            return
        if not self.path.exists():
            check_file(self.path, overwrite)
            return
        for name in DIRECTORY_FILES:
            check_file(self.path / name, overwrite)


def kind_of(text: str) -> str | None:
    """What a path that is to be written says it is: "onnx", "pt2", "directory", or nothing."""
    path = Path(text)
    if text.endswith(("/", os.sep)) or path.is_dir():
        return "directory"
    return path.suffix[1:] if path.suffix in (".onnx", ".pt2") else None


def named(where: str, path: Any, suffix: str) -> str:
    """A path as text; raises BadParameter where it is none, and UnknownOutputFormat where it ends in another suffix."""
    text = path_text(where, path)
    if not text.endswith(suffix):
        raise UnknownOutputFormat(path=text)
    return text


def stem_of(source: str) -> str:
    """`timm:vit_small` -> vit_small, `hf:org/name` -> name, `a/b.pt2` -> b, `nets.py:make` -> make."""
    path, _, function = source.rpartition(":")
    name = function if path.endswith(".py") or path in ("timm", "hf") else source
    name = name.rstrip("/").split("/")[-1]
    return name.removesuffix(".pt2").removesuffix(".onnx") or "model"


def check_file(path: Path, overwrite: bool) -> None:
    """Raise OutputExists or OutputNotWritable if the file cannot be written there."""
    parent = path.parent
    for ancestor in reversed(path.absolute().parents):
        if ancestor.exists() and not ancestor.is_dir():
            raise OutputNotWritable(path=path, reason=f"{ancestor} is a file")
    if not parent.is_dir():
        raise OutputNotWritable(path=path, reason=f"the directory {parent} does not exist")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputNotWritable(path=path, reason=f"no permission to write in {parent}")
    if path.is_dir():
        raise OutputNotWritable(path=path, reason="it is a directory")
    if path.exists() and not overwrite:
        raise OutputExists(path=path)
    with staged(parent):  # permissions do not say all: a file system may be read-only, full, or no place for files
        pass


@contextmanager
def whole(path: Path, overwrite: bool) -> Iterator[Path]:
    """A path to write to, in a hidden directory beside; what was written there moves to `path`'s directory on success.

    On an exception nothing is left and nothing was touched.
    """
    check_file(path, overwrite)
    with staged(path.parent) as stage:
        yield stage / path.name
        for file in sorted(stage.iterdir(), key=lambda f: f.name == path.name):  # the file that names the others last
            os.replace(file, path.parent / file.name)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `path`, or whose files are moved into `path` if that exists."""
    with staged(path.absolute().parent) as stage:
        content = stage / "content"
        content.mkdir()
        yield content
        if not path.exists():
            os.replace(content, path)
            return
        for file in sorted(f for f in content.rglob("*") if f.is_file()):
            target = path / file.relative_to(content)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)


@contextmanager
def staged(parent: Path) -> Iterator[Path]:
    """A hidden directory in `parent` (one file system: a rename is atomic), removed at the end."""
    try:
        stage = Path(tempfile.mkdtemp(prefix=".tamis-", dir=parent))
    except OSError as error:
        raise OutputNotWritable(path=parent, reason=error.strerror) from error
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_text(path: Path, text: str, overwrite: bool) -> None:
    """Write a text file whole."""
    with whole(path, overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy_companions(source: str | os.PathLike[str] | None, target: Path) -> list[str]:
    """Copy tokenizer and configuration files of a source directory; returns their names."""
    if source is None:
        return []
    copied = []
    for name in COMPANIONS:
        file = Path(source) / name
        if file.is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target / name)
            copied.append(name)
    return copied
