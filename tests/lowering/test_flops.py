from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

from tamis.lowering.flops import count_flops


def linear(batch, tokens):
    return 2 * batch * tokens * 8 * 8


def attention(batch, tokens):
    return 2 * 2 * batch * tokens * tokens * 8


@pytest.mark.parametrize("symbolic", [False, True])
def test_every_node_counts_what_it_computes(make_program, make_tokens, symbolic):
    program = make_program(length=True, dynamic=True, symbolic=symbolic)
    flops = count_flops(program, ((make_tokens(3, 20),), {}))
    assert flops.by_node == {
        "toy_take": 3 * 18 * 8,
        "scaled_dot_product_attention": attention(3, 18),
        "linear": linear(3, 18),
        "toy_take_1": 3 * 16 * 8,
        "scaled_dot_product_attention_1": attention(3, 16),
        "linear_1": linear(3, 16),
    }
    assert flops.total == sum(flops.by_node.values())
    assert flops.tokens == {"token_count": 18, "token_count_1": 16}
    assert flops.uncounted == ()


def test_example_inputs_are_the_default(make_program, make_tokens):
    program = make_program()
    assert count_flops(program) == count_flops(program, ((make_tokens(2),), {}))


def test_masked_attention_and_products_count():
    class Model(nn.Module):
        def forward(self, x, mask):
            y = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
            return y @ y.transpose(-1, -2)

    x, mask = torch.ones(2, 3, 7, 4), torch.ones(2, 1, 7, 7, dtype=torch.bool)
    flops = count_flops(torch.export.export(Model(), (x, mask)))
    assert flops.by_node["scaled_dot_product_attention"] == 2 * 2 * 2 * 3 * 7 * 7 * 4
    assert flops.by_node["matmul"] == 2 * 2 * 3 * 7 * 7 * 4


def test_a_vision_transformer_counts_what_its_formula_says():
    family = zoo.FAMILIES["vit_small"]
    model, (args, kwargs) = family.shared(), family.inputs(batch=2)
    tokens, width, layers = 197, model.embed_dim, len(model.blocks)
    hidden = model.blocks[0].mlp.fc1.out_features
    block = tokens * width * (4 * width + 2 * hidden) + 2 * tokens * tokens * width
    macs = layers * block + 196 * width * 768 + width * model.num_classes
    assert count_flops(torch.export.export(model, args, kwargs)).total == 2 * 2 * macs
