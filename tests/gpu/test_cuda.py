"""What must hold on a CUDA device: the rewritten model computes there what it computes on the CPU."""

from __future__ import annotations

import pytest
import torch
from zoo import FAMILIES

import tamis

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("mode", [None, "default"])
@pytest.mark.parametrize("recipe", ["tome:r=3", "evit:keep_ratio=0.6,layers=[0,1]", "random:keep_ratio=0.7,layers=[1]"])
@pytest.mark.parametrize("name", ["vit_small", "bert"])
def test_cuda_equals_cpu(name: str, recipe: str, mode: str | None) -> None:
    family = FAMILIES[name]
    model = family.model(torch.float64)
    args, kwargs = family.inputs(2, dtype=torch.float64)
    on_cpu = tamis.compile(model, args, kwargs=kwargs, passes=recipe, verify=False)
    expected = torch.utils._pytree.tree_leaves(on_cpu(*args, **kwargs))
    args, kwargs = torch.utils._pytree.tree_map(lambda x: x.cuda(), (args, kwargs))
    on_gpu = tamis.compile(model.cuda(), args, kwargs=kwargs, passes=recipe, mode=mode, verify=False)
    got = torch.utils._pytree.tree_leaves(on_gpu(*args, **kwargs))
    for have, want in zip(got, expected, strict=True):
        torch.testing.assert_close(have.cpu(), want, rtol=1e-8, atol=1e-8)
