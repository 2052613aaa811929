"""The oracle without a method is the model itself."""

import pytest
import torch
from oracle import reduced_forward
from torch.utils import _pytree as pytree
from zoo import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_the_oracle_without_a_pass_is_the_model(name):
    family = FAMILIES[name]
    model = family.shared(torch.float64)
    args, kwargs = family.inputs(3, dtype=torch.float64)
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*args, **kwargs))
    got = reduced_forward(family, model, (args, kwargs)).outputs
    assert [x.shape for x in got] == [x.shape for x in expected]
    assert all(len(x) == 3 for x in got)
    for mine, dense in zip(got, expected, strict=True):
        assert (mine - dense).abs().max() <= 1e-9 * dense.abs().max()
