from __future__ import annotations

import re

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code

from tamis.errors import InputMismatch
from tamis.lowering.callables import lower
from tamis.lowering.inline import inline_ops
from tamis.target import Target

CPU = Target.parse("cpu")


def kernels_made(call):
    metrics.reset()
    result = call()
    return result, metrics.generated_kernel_count


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def test_eager_is_the_inlined_program(program, make_tokens):
    given = make_tokens(3)
    expected, got = program.module()(given), lower(program, CPU)(given)
    torch.testing.assert_close(got["last_hidden_state"], expected["last_hidden_state"], rtol=0, atol=0)


def test_inductor_equals_eager_and_compiles_once_for_all_sizes(make_program, make_tokens):
    program = make_program(length=True, dynamic=True, symbolic=True)
    eager, compiled = lower(program, CPU), lower(program, CPU, "default")
    made = []
    # 8 is a token count, 10 another
    for batch, length in [(2, 12), (5, 12), (8, 12), (10, 12), (10, 20), (1, 12), (1, 12), (3, 12)]:
        given = make_tokens(batch, length)
        got, kernels = kernels_made(lambda given=given: compiled(given))
        made.append(kernels)
        expected = eager(given)
        assert got.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-5)
        # marks are for the compiler; the caller's tensors are not ours
        assert not [name for name in vars(given) if "dynamic" in name]
    assert made[0] > 0
    assert made[1:5] == [0, 0, 0, 0]
    assert made[6:] == [0, 0]


def kernels_of(program, given):
    _, codes = run_and_get_code(lower(program, CPU, "default"), given)
    return len(re.findall(r"^\w+ = async_compile", "".join(codes), re.MULTILINE))


@pytest.mark.parametrize("placed", [True, False])
def test_flex_attention_is_compiled_for_the_threads_there_are(make_program, make_tokens, placed):
    """And is cached so: torch 2.11 would run its kernel, compiled for one thread, with any number.  Others are not."""
    module, seen, before = lower(make_program(), CPU, "default"), [], torch.get_num_threads()
    module.placed = placed
    module.compiled = module.inner  # what Inductor is given, run as it is
    module.inner.register_forward_pre_hook(lambda *_: seen.append(inductor_config.cpp.threads))
    try:
        for many in (1, 3):
            torch.set_num_threads(many)
            module(make_tokens(3, 12))
    finally:
        torch.set_num_threads(before)
    assert seen == ([1, 3] if placed else [-1, -1])
    assert inductor_config.cpp.threads == -1


def test_layers_share_kernels(make_program, make_tokens):
    given = make_tokens(3, 12)
    two = kernels_of(make_program(dynamic=True, symbolic=True, layers=2), given)
    three = kernels_of(make_program(dynamic=True, symbolic=True, layers=3), given)
    assert 0 < three == two


def test_inlined_program_packages_ahead_of_time(make_program, make_tokens, tmp_path):
    program = make_program(length=True, dynamic=True, layers=1)
    path = torch._inductor.aoti_compile_and_package(inline_ops(program), package_path=str(tmp_path / "toy.pt2"))
    packaged = torch._inductor.aoti_load_package(path)
    for batch, length in [(2, 12), (5, 17)]:
        given = make_tokens(batch, length)
        expected, got = program.module()(given), packaged(given)
        torch.testing.assert_close(got["last_hidden_state"], expected["last_hidden_state"], rtol=1e-5, atol=1e-5)


def test_arguments_packed_otherwise_are_refused(make_program, make_tokens):
    compiled = lower(make_program(), CPU, "default")
    with pytest.raises(InputMismatch, match="1 positional"):
        compiled(make_tokens(2), make_tokens(2))
