"""What attention's launches are made of: constants never hold a size that may change, alignment is known without it."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tamis.kernels.symbols import backed_symbol
from tamis.kernels.triton import attention, attention_lse, attention_received, attention_rows
from tamis.kernels.triton.architecture import Architecture
from tamis.kernels.triton.attention_tiles import unit_of

SM_90 = Architecture.named("sm_90")


def test_one_launch_serves_every_batch_and_length():
    shape_env = ShapeEnv()
    batch, tokens = (backed_symbol(shape_env, n) for n in (8, 197))
    with FakeTensorMode(shape_env=shape_env):
        packed = torch.empty(batch, tokens, 3, 12, 72, dtype=torch.float16, device="meta")
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        bias, lse = torch.empty(batch, tokens, device="meta"), torch.empty(batch, 12, tokens, device="meta")
        guards = len(shape_env.guards)
        works = [
            attention.TWIN.work(SM_90, q, k, v, bias, None, 0.1, True),
            attention_lse.TWIN.work(SM_90, q, k, bias, None, 0.1, True),
            attention_rows.TWIN.work(SM_90, q[:, :, :1], k, bias, None, 0.1),
            attention_received.TWIN.work(SM_90, q, k, lse, bias, None, bias, 0.1, True),
        ]
    for (launch,), _ in works:
        assert all(type(value) in (int, bool) for value in launch.config.constants.values())
        assert launch.config.constants["UNIT"] == 8
        assert str(launch.arguments["keys"]) == str(tokens)
    assert len(shape_env.guards) == guards
    (launch,), out = works[0]
    assert out.transpose(1, 2).is_contiguous()  # joining heads copies nothing
    assert launch.grid[1:] == (12, batch)


def test_alignment_is_that_of_every_stride():
    x = torch.empty(2, 4, 6, 72, dtype=torch.float16)
    assert unit_of(x) == 8
    assert unit_of(x.float()) == 4
    assert unit_of(x, torch.empty(2, 4, 6, 70, dtype=torch.float16)) == 1
