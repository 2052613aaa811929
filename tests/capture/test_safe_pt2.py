"""`load_program` runs nothing that is in a file: pickles, shape expressions, guards, op names."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tamis.capture.program_text import is_guard, is_shape_expression
from tamis.capture.safe_pt2 import load_program
from tamis.errors import CorruptModel, ModelNotFound, PickleRefused, UnsafeProgram, UntrustedNativeCode


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.constant = torch.ones(4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x) + self.constant + y[: x.shape[0]].sum()


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    shapes = ({0: Dim("batch")}, {0: Dim("batch")})
    program = torch.export.export(Model().eval(), (torch.ones(2, 4), torch.ones(2, 4)), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


def changed(saved: Path, path: Path, edits: dict[str, Callable[[bytes], bytes] | bytes]) -> Path:
    """A copy of the file with some members changed or added; names are without the archive's root."""
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        root = old.namelist()[0].split("/")[0]
        left = dict(edits)
        for name in old.namelist():
            content, short = old.read(name), name.removeprefix(f"{root}/")
            edit = left.pop(short, content)
            new.writestr(name, edit(content) if callable(edit) else edit)
        for short, edit in left.items():
            assert isinstance(edit, bytes)
            new.writestr(f"{root}/{short}", edit)
    return path


def edited(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    """An edit of a JSON member in place."""

    def edit(content: bytes) -> bytes:
        value = json.loads(content)
        change(value)
        return json.dumps(value).encode()

    return edit


def torch_saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def pickled(folder: str, member: str, content: bytes) -> dict[str, Any]:
    """Edits that make a weight or constant a pickled one."""

    def point(config: Any) -> None:
        first = next(iter(config["config"].values()))
        first["path_name"], first["use_pickle"] = member, True

    return {f"data/{folder}/model_{folder}_config.json": edited(point), f"data/{folder}/{member}": content}


PLACES: dict[str, Callable[[bytes, bytes], dict[str, Any]]] = {
    "data/sample_inputs/model.pt": lambda bomb, plain: {"data/sample_inputs/model.pt": bomb},
    "data/weights/weight_9": lambda bomb, plain: pickled("weights", "weight_9", bomb),
    "data/constants/tensor_9": lambda bomb, plain: pickled("constants", "tensor_9", bomb),
    "data/constants/custom_obj_0": lambda bomb, plain: pickled("constants", "custom_obj_0", bomb),
    "data/constants/opaque_obj_0": lambda bomb, plain: pickled("constants", "opaque_obj_0", plain),
    "data/weights/model.pt": lambda bomb, plain: {"data/weights/model.pt": bomb},
    "data/constants/model.pt": lambda bomb, plain: {"data/constants/model.pt": bomb},
}


@pytest.mark.parametrize("member", PLACES)
def test_pickles_are_refused_and_not_run(saved: Path, tmp_path: Path, member: str) -> None:
    marker = tmp_path / "ran"
    bombs = torch_saved(({"x": Bomb(marker)}, {})), pickle.dumps(Bomb(marker))
    path = changed(saved, tmp_path / "bad.pt2", PLACES[member](*bombs))
    with pytest.raises(PickleRefused) as caught:
        load_program(path)
    assert not marker.exists()
    assert caught.value.member == member
    assert f"member {member!r} needs pickle, which can run code, and was not loaded" in str(caught.value)


def test_the_bomb_works(tmp_path: Path) -> None:
    torch.load(io.BytesIO(torch_saved(Bomb(tmp_path / "ran"))), weights_only=False)
    assert (tmp_path / "ran").exists()


def test_pickled_tensors_are_fine(saved: Path, tmp_path: Path) -> None:
    edits = pickled("constants", "tensor_9", torch_saved(torch.full((4,), 7.0)))
    program = load_program(changed(saved, tmp_path / "m.pt2", edits))
    assert float(next(iter(program.constants.values()))[0]) == 7


def test_round_trip(saved: Path) -> None:
    program, reference = load_program(saved), torch.export.load(saved)
    x = torch.arange(12.0).reshape(3, 4)
    torch.testing.assert_close(program.module()(x, x), reference.module()(x, x), rtol=0, atol=0)
    assert program.example_inputs is not None


def test_programs_with_our_ops_load(tmp_path: Path) -> None:
    import tamis.kernels  # noqa: F401

    class Ours(nn.Module):
        def forward(self, x: Tensor, slot: Tensor) -> Tensor:
            return torch.ops.tamis.restore_tokens(x, slot)

    x, slot = torch.randn(2, 3, 4), torch.tensor([[0, 1, 1, 2], [2, 1, 0, 0]])
    program = torch.export.export(Ours(), (x, slot))
    torch.export.save(program, tmp_path / "ours.pt2")
    torch.testing.assert_close(load_program(tmp_path / "ours.pt2").module()(x, slot), Ours()(x, slot))


def marker_code(path: Path) -> str:
    return f"open({str(path)!r}, 'w')"


def nodes(program: Any) -> Any:
    return program["graph_module"]["graph"]["nodes"]


def set_shape(program: Any, text: str) -> None:
    for value in program["graph_module"]["graph"]["tensor_values"].values():
        for size in value["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = text


CODE: dict[str, tuple[Callable[[Any, str], Any], str]] = {
    "shape": (set_shape, "holds the shape "),
    "shape in text": (lambda p, code: set_shape(p, f"Max(Symbol('s0'), {code!r})"), "holds the shape "),
    "guard": (lambda p, code: p["guards_code"].append(code), "holds the guard "),
    "guard in its message": (
        lambda p, code: p["guards_code"].append(f"L['x\" + str({code}) + \"'].size()[0] == 2"),
        "holds the guard ",
    ),
    "call": (lambda p, code: nodes(p)[0].update(target="torch.os.system"), "holds a call of 'torch.os.system'"),
    "file op": (
        lambda p, code: nodes(p)[0].update(target="torch.ops.aten.from_file.default"),
        "holds a call of 'torch.ops.aten.from_file.default'",
    ),
    "import": (
        lambda p, code: p["graph_module"]["module_call_graph"][0]["signature"].update(
            in_spec=json.dumps(
                [1, {"type": "builtins.dict", "context": json.dumps([{"__enum__": 1, "fqn": "this:x"}])}]
            )
        ),
        "holds the structure ",
    ),
}


@pytest.mark.parametrize("name", CODE)
def test_text_that_would_run_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    change, what = CODE[name]
    marker = tmp_path / "ran"
    edits = {"models/model.json": edited(lambda program: change(program, marker_code(marker)))}
    with pytest.raises(UnsafeProgram) as caught:
        load_program(changed(saved, tmp_path / "bad.pt2", edits))
    assert not marker.exists()
    assert f"member 'models/model.json' {what}" in str(caught.value)
    assert "which would run as code, and was not loaded" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Add(Integer(1), Mul(Integer(-1), Symbol('s0')))", True),
        ("FloorDiv(Symbol('s0'), 2)", True),
        ("2*s0 + 1", True),
        ("sympify('1')", False),
        ("Symbol('s0').func", False),
        ("Mul('exit()', 2)", False),
        ("Symbol('exit()')", False),
        ("(lambda: 1)()", False),
        ("[x for x in y]", False),
        ("__import__", False),
        ("s0 # comment", False),
        (3, False),
    ],
)
def test_shape_expressions(text: Any, allowed: bool) -> None:
    assert is_shape_expression(text) == allowed


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("L['x'].size()[0] == L['y'].size()[0]", True),
        ("(L['a']['b'][0].size()[1] % 4) == 0", True),
        ("2 <= L['x'].size()[1] and L['x'].size()[1] <= 512", True),
        ("max(1, L['x'].size()[0]) > 0", True),
        ("math.floor(L['x'].size()[0] / 2) == 1", True),
        ("exit()", False),
        ("L['x'].__class__", False),
        ("eval('1')", False),
        ("getattr(L, 'x')", False),
        ("L['x'].size()[0] == 1 # \"", False),
        ('L["x"].size()[0] == 1', False),
        ("1\n2", False),
    ],
)
def test_guards(text: str, allowed: bool) -> None:
    assert is_guard(text) == allowed


def test_native_code(saved: Path, tmp_path: Path) -> None:
    path = changed(saved, tmp_path / "aoti.pt2", {"data/aotinductor/model/wrapper.so": b"\x7fELF"})
    with pytest.raises(
        UntrustedNativeCode, match=r"is an AOTInductor package, which is native code.\n  hint: pass trusted"
    ):
        load_program(path)


def test_damage(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    cases = {
        "empty": (b"", "it is not an archive, or its end is missing"),
        "text": (b"hello" * 100, "it is not an archive, or its end is missing"),
        "cut": (content[: len(content) // 2], "it is not an archive, or its end is missing"),
    }
    for name, (data, reason) in cases.items():
        path = tmp_path / f"{name}.pt2"
        path.write_bytes(data)
        with pytest.raises(CorruptModel) as caught:
            load_program(path)
        expected = f"{path}: cannot be read as an exported program (.pt2): {reason}.\n"
        assert str(caught.value) == expected + "  hint: export the model again; the file may be cut short."


def test_flipped_bytes(saved: Path, tmp_path: Path) -> None:
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith("weight_0"))
    start = content.index(info.filename.encode()) + len(info.filename)
    for i in range(start, start + 120):
        content[i] ^= 0xFF
    path = tmp_path / "flipped.pt2"
    path.write_bytes(content)
    with pytest.raises(CorruptModel, match="cannot be read as an exported program"):
        load_program(path)


def test_archives_that_hold_no_program(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(CorruptModel, match="cannot be read as an exported program"):
        load_program(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.1")
        archive.writestr("serialized_example_inputs.pt", pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CorruptModel, match=r"it was saved by torch 2.7 or older"):
        load_program(path)
    assert not (tmp_path / "ran").exists()
    broken = {"models/model.json": edited(lambda program: program.pop("graph_module"))}
    with pytest.raises(CorruptModel, match="cannot be read as an exported program"):
        load_program(changed(saved, path, broken))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(
        ModelNotFound, match=r"no such file or directory.\n  hint: name a .pt2 file written by torch.export"
    ):
        load_program(tmp_path / "none.pt2")
