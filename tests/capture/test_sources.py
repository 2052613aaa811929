"""`resolve`: modules, programs, names, directories and factories become a model with example inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import FAMILIES

from tamis.capture.export import export_module
from tamis.capture.sources import resolve
from tamis.errors import (
    CorruptModel,
    ExampleInputsMissing,
    FactoryFailed,
    MissingDependency,
    ModelNotFound,
    PickleRefused,
    UnknownModelFormat,
    UnknownModelName,
)


def test_a_module() -> None:
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    source = resolve(model, (x,), {"scale": 2})
    assert source.model is model
    assert (source.args, source.kwargs, source.name, source.kind) == ((x,), {"scale": 2}, "Linear", "module")
    assert resolve(torch.fx.symbolic_trace(model), (x,)).kind == "module"


def test_a_program_has_its_own_inputs() -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    source = resolve(program)
    assert (source.kind, source.args[0].shape, source.kwargs) == ("program", (1, 2), {})
    assert resolve(program, (torch.ones(3, 2),)).args[0].shape == (3, 2)


def test_a_pt2_file(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), path)
    for spec in (path, str(path)):
        source = resolve(spec)
        assert (source.name, source.kind, source.directory) == ("net", "pt2", tmp_path)
        assert torch.equal(source.args[0], torch.ones(1, 2))


def test_other_things() -> None:
    with pytest.raises(
        UnknownModelFormat, match=r"^3: do not know how to read this.*\n  hint: give an nn.Module, an Exported"
    ):
        resolve(3)
    with pytest.raises(ModelNotFound, match=r"nothing.pt2: no such file"):
        resolve("nothing.pt2")


# --- timm -----------------------------------------------------------------------------------------------------------


def test_timm() -> None:
    state = torch.get_rng_state()
    first, second = resolve("timm:vit_tiny_patch16_224"), resolve("timm:vit_tiny_patch16_224")
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    assert isinstance(first.model, nn.Module)
    assert isinstance(second.model, nn.Module)
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key])
    assert not first.model.training
    assert (first.name, first.kind, first.args[0].shape) == ("vit_tiny_patch16_224", "timm", (2, 3, 224, 224))
    assert first.note == "weights are random (seed 0): pretrained ones are not in the local cache"


def test_timm_uses_cached_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    import timm
    from safetensors.torch import save_file

    other = timm.create_model("vit_tiny_patch16_224")
    save_file(other.state_dict(), tmp_path / "model.safetensors")
    found = lambda *_, **__: str(tmp_path / "model.safetensors")  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", found)
    source = resolve("timm:vit_tiny_patch16_224")
    assert isinstance(source.model, nn.Module)
    assert torch.equal(source.model.state_dict()["head.weight"], other.state_dict()["head.weight"])
    assert source.note == ""


def test_timm_unknown() -> None:
    with pytest.raises(
        UnknownModelName,
        match=r"timm:vit_smal_patch16_224: timm has no model.*\n  hint: did you mean vit_small_patch16",
    ):
        resolve("timm:vit_smal_patch16_224")


# --- Hugging Face ---------------------------------------------------------------------------------------------------


@pytest.fixture
def bert_dir(tmp_path: Path) -> Path:
    FAMILIES["bert"].model(layers=1).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_hf_text(bert_dir: Path) -> None:
    for spec in (f"hf:{bert_dir}", bert_dir):
        source = resolve(spec)
        assert (source.name, source.kind, source.directory) == ("bert", "hf", bert_dir)
        assert {k: tuple(v.shape) for k, v in source.kwargs.items()} == {
            "input_ids": (2, 16),
            "attention_mask": (2, 16),
        }
        assert type(source.model).__name__ == "BertModel"
    assert isinstance(source.model, nn.Module)
    expected = FAMILIES["bert"].model(layers=1).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in source.model.state_dict().items())
    assert resolve(bert_dir, kwargs={"input_ids": torch.ones(1, 3, dtype=torch.int64)}).kwargs.keys() == {"input_ids"}


def test_hf_image_with_its_head(tmp_path: Path) -> None:
    model = FAMILIES["hf_vit"].build(1)
    from transformers import ViTForImageClassification

    with torch.random.fork_rng():
        ViTForImageClassification(model.config).to(torch.bfloat16).save_pretrained(tmp_path / "vit")
    source = resolve(f"hf:{tmp_path / 'vit'}")
    assert type(source.model).__name__ == "ViTForImageClassification"
    assert source.kwargs["pixel_values"].shape == (2, 3, 96, 96)
    assert isinstance(source.model, nn.Module)
    assert source.kwargs["pixel_values"].dtype == next(source.model.parameters()).dtype == torch.bfloat16
    assert export_module(source.model, source.args, source.kwargs).module()(**source.kwargs).logits.shape == (2, 7)


def test_hf_pickled_weights(bert_dir: Path) -> None:
    (bert_dir / "model.safetensors").unlink()
    with pytest.raises(
        ModelNotFound, match=r"model.safetensors: no such file or directory.\n  hint: save the model there"
    ):
        resolve(bert_dir)
    (bert_dir / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(PickleRefused, match=r"member 'pytorch_model.bin' needs pickle.*\(only safetensors are read\)"):
        resolve(bert_dir)


def test_hf_code_is_not_run(bert_dir: Path) -> None:
    marker = bert_dir / "ran"
    (bert_dir / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((bert_dir / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.C", "AutoModel": "own.M"})
    (bert_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnknownModelFormat, match="give a model whose class is part of transformers; code that comes with"
    ):
        resolve(bert_dir)
    assert not marker.exists()


def test_hf_damage(bert_dir: Path) -> None:
    (bert_dir / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CorruptModel, match="cannot be read as a Hugging Face model: "):
        resolve(bert_dir)


def test_hf_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        UnknownModelName, match=r"hf:nobody/nothing: no such model in the local cache or on the hub.\n  hint: give a"
    ):
        resolve("hf:nobody/nothing")


def test_hf_neither_text_nor_images(tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
    small = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embeddings": 4}
    config = Wav2Vec2Config(**sizes, **small, num_conv_pos_embedding_groups=2)
    with torch.random.fork_rng():
        Wav2Vec2Model(config).save_pretrained(tmp_path / "wav")
    with pytest.raises(ExampleInputsMissing, match="it takes input_values; pass args or kwargs"):
        resolve(tmp_path / "wav")


@pytest.mark.parametrize(("spec", "package"), [("timm:vit_tiny_patch16_224", "timm"), ("hf:gpt2", "transformers")])
def test_missing_packages(monkeypatch: pytest.MonkeyPatch, spec: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency) as caught:
        resolve(spec)
    assert str(caught.value) == (
        f"{spec} needs the package {package!r}, which is not installed.\n  hint: pip install 'tamis[models]'"
    )


# --- factories ------------------------------------------------------------------------------------------------------

FACTORY = """
import torch
from torch import nn
from beside import WIDTH

def bare(): return nn.Linear(WIDTH, 2).eval()
def pair(): return bare(), (torch.ones(1, WIDTH),)
def triple(): return bare(), (), {"input": torch.ones(1, WIDTH)}
def fails():
    raise ValueError("no luck today.")
def number(): return 3
def wrong(): return 1, 2
def needs(x): return x
constant = 3
"""


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 4\n")
    (tmp_path / "net.py").write_text(FACTORY)
    return tmp_path / "net.py"


@pytest.mark.parametrize(("function", "given"), [("bare", (0, 0)), ("pair", (1, 0)), ("triple", (0, 1))])
def test_factories(factory: Path, function: str, given: tuple[int, int]) -> None:
    before = list(sys.path)
    source = resolve(f"{factory}:{function}")
    assert isinstance(source.model, nn.Linear)
    assert (len(source.args), len(source.kwargs)) == given
    assert (source.name, source.kind, source.directory) == (function, "factory", factory.parent)
    assert sys.path == before
    assert len(resolve(f"{factory}:{function}", (torch.ones(2, 4),)).args) == 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("fails", "ValueError: no luck today (line 10)"),
        ("number", "it returned int"),
        ("wrong", "it returned (int, int)"),
        ("needs", "TypeError: needs() missing 1 required positional argument: 'x'"),
        ("triplet", "the file has no function 'triplet'; did you mean triple?"),
        ("constant", "the file has no function 'constant'"),
    ],
)
def test_failing_factories(factory: Path, function: str, reason: str) -> None:
    with pytest.raises(FactoryFailed) as caught:
        resolve(f"{factory}:{function}")
    assert str(caught.value) == (
        f"{factory}:{function}: {reason}.\n"
        "  hint: name a function without arguments that returns (model, args) or (model, args, kwargs)."
    )


def test_factories_that_do_not_load(factory: Path) -> None:
    for text, reason in (
        ("def make(:\n", "SyntaxError: invalid syntax (net.py, line 1) (line 1)"),
        ("import nowhere\n", "ModuleNotFoundError: No module named 'nowhere' (line 1)"),
        ("exit(3)\n", "SystemExit: 3"),
    ):
        factory.write_text(text)
        with pytest.raises(FactoryFailed) as caught:
            resolve(f"{factory}:make")
        assert reason in str(caught.value)


def test_hf_works_in_a_checkout(bert_dir: Path) -> None:
    """There the current directory holds folders called `kernels` and `core`, which other packages look for."""
    checkout = Path(__file__).resolve().parents[2]
    code = f"from tamis.capture.sources import resolve; print(type(resolve({str(bert_dir)!r}).model).__name__)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["BertModel"], ran.stderr[-2000:]
