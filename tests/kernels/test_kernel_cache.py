"""A binary compiled ahead of time is the one that Triton looks for on the target, though no GPU is here to ask it."""

from __future__ import annotations

import pytest
import torch

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.kernels.triton import twin_of
from tamis.kernels.triton.ahead import compile_launch, gpu_target
from tamis.kernels.triton.architecture import Architecture
from tamis.op import OPS
from tamis.runtime.binaries import Entry, install

SM_90 = Architecture.named("sm_90")


class Sm90Driver:
    """What Triton's JIT asks of a GPU before it launches."""

    def get_current_target(self):
        return gpu_target(SM_90)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def sm_90(monkeypatch):
    from triton.runtime.driver import driver

    monkeypatch.setattr(driver, "_active", Sm90Driver())


def launch(batch: int = 8):
    twin = twin_of(OPS["restore_tokens"])
    y, source = torch.empty(batch, 46, 1024, dtype=torch.float16), torch.zeros(batch, 197, dtype=torch.int64)
    (one,), _ = twin.work(SM_90, y, source)
    return one


def key_of_the_jit(one) -> str:
    kernel = one.kernel.run(grid=one.grid, warmup=True, **one.arguments, **one.config.constants, **one.config.options)
    return kernel.hash


@pytest.mark.parametrize("batch", [1, 8])
def test_the_key_is_the_one_the_jit_asks_for(batch, sm_90, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert key_of_the_jit(launch(batch)) == compile_launch(launch(batch), SM_90).key


def test_an_installed_binary_needs_no_compiler(sm_90, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "here"))
    one = launch()
    binary = compile_launch(one, SM_90)
    entry = tmp_path / "entry"
    entry.mkdir()
    for name, content in binary.files.items():
        (entry / name).write_bytes(content)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "there"))
    monkeypatch.setattr("triton.backends.nvidia.compiler.CUDABackend.add_stages", _no_compiler)
    one.kernel.device_caches.clear()
    with pytest.raises(RuntimeError, match="no compiler"):
        key_of_the_jit(one)
    install(Entry.read(tmp_path, {"name": "entry", "cache_key": binary.key, "kernel": binary.kernel}))
    one.kernel.device_caches.clear()
    assert key_of_the_jit(one) == binary.key


def _no_compiler(*_, **__):
    raise RuntimeError("no compiler")


def test_links_and_strange_names_are_refused(tmp_path):
    entry = tmp_path / "entry"
    entry.mkdir()
    (entry / "kernel.cubin").symlink_to("/etc/hostname")
    listed = {"name": "entry", "cache_key": "0" * 64, "kernel": "kernel"}
    with pytest.raises(ValueError, match="not a folder of plain files"):
        Entry.read(tmp_path, listed)
    for wrong in ({"cache_key": "../" * 5}, {"name": "../entry"}, {"kernel": "../kernel"}):
        with pytest.raises(ValueError, match="not an entry"):
            Entry.read(tmp_path, {**listed, **wrong})
