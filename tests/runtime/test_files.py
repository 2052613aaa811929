"""Outputs are refused before work starts and written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tamis.errors import OutputExists, OutputNotWritable, UnknownOutputFormat
from tamis.runtime.files import Output, copy_companions, stem_of, whole, whole_directory


@pytest.mark.parametrize(
    ("source", "stem"),
    [
        ("timm:vit_small", "vit_small"),
        ("hf:org/name", "name"),
        ("hf:./minilm/", "minilm"),
        ("a/b.pt2", "b"),
        ("nets.py:make", "make"),
        ("model.onnx", "model"),
    ],
)
def test_default_name(source: str, stem: str) -> None:
    assert stem_of(source) == stem
    assert Output.of(None, source) == Output(Path(f"{stem}-tamis.onnx"), "onnx")


def test_kinds(tmp_path: Path) -> None:
    assert Output.of("a.onnx", "x").kind == "onnx"
    assert Output.of("a.pt2", "x").kind == "pt2"
    assert Output.of("out/", "x").kind == "directory"
    assert Output.of(str(tmp_path), "x").kind == "directory"
    with pytest.raises(UnknownOutputFormat, match=r"a\.bin: cannot tell from the name what to write"):
        Output.of("a.bin", "x")


def test_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("old")
    (tmp_path / "d.onnx").mkdir()
    with pytest.raises(OutputExists, match="exists already and was left alone"):
        Output(tmp_path / "a.onnx", "onnx").check(False)
    Output(tmp_path / "a.onnx", "onnx").check(True)
    with pytest.raises(OutputNotWritable, match="it is a directory"):
        Output(tmp_path / "d.onnx", "onnx").check(True)
    with pytest.raises(OutputNotWritable, match=r"the directory .*missing does not exist"):
        Output(tmp_path / "missing" / "a.onnx", "onnx").check(False)
    with pytest.raises(OutputNotWritable, match=r"a\.onnx is a file"):
        Output(tmp_path / "a.onnx" / "b.onnx", "onnx").check(False)
    with pytest.raises(OutputNotWritable, match=r"a\.onnx is a file"):
        Output(tmp_path / "a.onnx" / "out", "directory").check(False)


def test_a_directory_may_exist_but_not_its_files(tmp_path: Path) -> None:
    Output(tmp_path / "new", "directory").check(False)
    Output(tmp_path, "directory").check(False)
    (tmp_path / "recipe.yaml").write_text("old")
    with pytest.raises(OutputExists, match=r"recipe\.yaml"):
        Output(tmp_path, "directory").check(False)
    Output(tmp_path, "directory").check(True)


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a.onnx"
    target.write_text("old")
    with pytest.raises(NotADirectoryError), whole(target, True) as temporary:
        (temporary / "missing").write_text("x" * temporary.write_text("half"))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.onnx": "old"}
    with whole(target, True) as temporary:
        temporary.write_text("new")
        (temporary.parent / "a.onnx.data").write_text("weights")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.onnx": "new", "a.onnx.data": "weights"}


def test_whole_directory(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(FileNotFoundError), whole_directory(target) as content:
        (content / "missing" / "x").write_text((content / "model.onnx").write_text("half") * "x")
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with whole_directory(target) as content:
            (content / "1_Pooling").mkdir()
            (content / "1_Pooling" / "config.json").write_text(text)
        assert (target / "1_Pooling" / "config.json").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_companions(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "1_Pooling").mkdir(parents=True)
    target.mkdir()
    for name in ("tokenizer.json", "model.safetensors", "1_Pooling/config.json"):
        (source / name).write_text("x")
    assert copy_companions(source, target) == ["tokenizer.json", "1_Pooling/config.json"]
    assert sorted(p.name for p in target.iterdir()) == ["1_Pooling", "tokenizer.json"]
    assert copy_companions(None, target) == []


def test_a_directory_that_takes_no_files_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions allow it (to root always), the file system does not."""

    def refuse(*args: object, **kwargs: object) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    for output in (Output.of(str(tmp_path / "a.onnx"), "x"), Output.of(str(tmp_path), "x")):
        with pytest.raises(OutputNotWritable, match="Read-only file system"):
            output.check(overwrite=False)
