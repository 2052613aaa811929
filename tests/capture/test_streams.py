"""Streams of one model: which values hold the same tokens in the same places, and which stream is taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zoo import draw, quietly

from tamis.capture import capture
from tamis.capture.streams import reached_in_place
from tamis.errors import NoTokenStream
from tamis.graph import TokenGraph

TOKENS, CHANNELS = 16, 8


class Between(nn.Module):
    """A norm, then `move`, then a norm."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.move(self.first(x)))


def stays(move: Callable[[Tensor], Tensor]) -> bool:
    """Whether the last norm holds the first one's tokens in place."""
    program = torch.export.export(Between(move).eval(), (torch.zeros(3, TOKENS, CHANNELS),), strict=False)
    first, last = (node for node in program.graph.nodes if "layer_norm" in node.name)
    return last in reached_in_place(program.graph, first)


def through_grid(x: Tensor) -> Tensor:
    grid = x.transpose(1, 2).reshape(-1, CHANNELS, 4, 4)
    return (grid + nn.functional.avg_pool2d(grid, 3, 1, 1)).flatten(2).transpose(1, 2)


def without_first(x: Tensor) -> Tensor:
    return torch.cat([x[:, :2], x[:, 2:] * 2], 1)


def turned_grid(x: Tensor) -> Tensor:
    return x.reshape(-1, 4, 4, CHANNELS).transpose(1, 2).reshape(-1, TOKENS, CHANNELS)


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "residual add": lambda x: x + x.flip(1),
    "scaled": lambda x: x * torch.ones(CHANNELS),
    "there and back": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a grid and its convolution beside it": through_grid,
    "first ones apart and back": without_first,
    "heads": lambda x: x.reshape(-1, TOKENS, 2, CHANNELS // 2).transpose(1, 2).transpose(1, 2).flatten(2),
    "half of the channels exchanged": lambda x: torch.cat([x[..., 4:], x[..., :4]], -1),
}
MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "flipped": lambda x: x.flip(1),
    "rolled": lambda x: x.roll(1, 1),
    "gathered": lambda x: x.gather(1, torch.arange(TOKENS).flip(0)[None, :, None].expand(3, -1, CHANNELS)),
    "indexed": lambda x: x[:, torch.arange(TOKENS).flip(0)],
    "a grid turned over": turned_grid,
    "first ones to the end": lambda x: torch.cat([x[:, 2:], x[:, :2]], 1),
    "others in front": lambda x: torch.cat([torch.ones(3, 1, CHANNELS), x], 1),
    "fewer in front than before": lambda x: torch.cat([x[:, :1], x[:, 2:]], 1),
    "pooled": lambda x: nn.functional.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "halved": lambda x: x.reshape(-1, TOKENS // 2, 2, CHANNELS).mean(2),
    "half folded into the batch": lambda x: x.reshape(-1, TOKENS // 2, CHANNELS),
    "mixed": lambda x: nn.functional.linear(x.transpose(1, 2), torch.eye(TOKENS)).transpose(1, 2),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_operations_that_leave_tokens_in_place(name: str) -> None:
    assert stays(IN_PLACE[name])


@pytest.mark.parametrize("name", MOVED)
def test_operations_that_start_another_stream(name: str) -> None:
    assert not stays(MOVED[name])


def roles(graph: TokenGraph) -> dict[str, str]:
    return {site.module: site.role for site in graph.sites}


def test_a_decoder_behind_a_gather_is_another_stream() -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    sizes = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 64, "patch_size": 16}
    decoder = {
        "decoder_num_hidden_layers": 1,
        "decoder_hidden_size": 24,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 48,
    }
    for masked in (0.75, 0.0):  # with 0.0 the decoder has as many tokens as the encoder, in another order
        config = ViTMAEConfig(**sizes, **decoder, num_hidden_layers=2, mask_ratio=masked)
        model = draw(quietly(lambda config=config: ViTMAEForPreTraining(config))).eval()
        graph = capture(model, (), {"pixel_values": torch.zeros(2, 3, 64, 64), "noise": torch.rand(2, 16)})
        assert [layer.site for layer in graph.layers] == [0, 1]
        assert roles(graph) == {
            "vit.layers.0.attention": "stream",
            "vit.layers.1.attention": "stream",
            "decoder.decoder_layers.0.attention": "other",
        }
        assert "works on another stream of tokens" in graph.sites[2].reason
        assert graph.sites[2].reason.endswith("starts at vit.layers.0.attention")


def test_of_two_towers_the_one_that_is_not_causal_is_taken() -> None:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}
    text = {"num_hidden_layers": 3, "vocab_size": 60, "eos_token_id": 59, "bos_token_id": 58, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**sizes, **text},
        vision_config={**sizes, "num_hidden_layers": 2, "image_size": 64, "patch_size": 16},
        projection_dim=16,
    )
    model = draw(quietly(lambda: CLIPModel(config))).eval()
    inputs = {
        "input_ids": torch.randint(5, 58, (2, 9)),
        "attention_mask": torch.ones(2, 9, dtype=torch.int64),
        "pixel_values": torch.zeros(2, 3, 64, 64),
    }
    graph = capture(model, (), inputs)
    found = roles(graph)
    assert {role for module, role in found.items() if module.startswith("vision")} == {"stream"}
    assert {role for module, role in found.items() if module.startswith("text")} == {"other"}
    assert (len(graph.layers), graph.prefix, graph.class_token, graph.grid) == (2, 1, True, (4, 4))


def test_of_stages_with_pooling_between_them_the_deepest_is_taken() -> None:
    import timm

    sizes = {"base_dims": (8, 8, 8), "heads": (2, 4, 8), "depth": (1, 2, 1)}
    model = draw(quietly(lambda: timm.create_model("pit_ti_224", pretrained=False, img_size=64, **sizes))).eval()
    graph = capture(model, (torch.zeros(2, 3, 64, 64),))
    assert [site.role for site in graph.sites] == ["other", "stream", "stream", "other"]


def test_two_attentions_of_one_block_are_one_layer() -> None:
    import timm

    sizes = {"depth": 2, "embed_dim": 80, "num_heads": 5, "img_size": 64}
    name = "vit_dlittle_patch16_reg1_gap_256"
    model = draw(quietly(lambda: timm.create_model(name, pretrained=False, **sizes))).eval()
    graph = capture(model, (torch.zeros(2, 3, 64, 64),))
    assert [site.role for site in graph.sites] == ["stream"] * 4
    assert [layer.site for layer in graph.layers] == [0, 2]


class Joint(nn.Module):
    """Attention over two streams side by side, as in SD3's transformer; each has a residual of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, 3 * CHANNELS)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        both = [
            made(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4) for made, x in ((self.one, image), (self.two, text))
        ]
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*both, strict=True))
        seen = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return image + seen[:, :TOKENS], text + seen[:, TOKENS:]


def test_attention_over_two_streams_is_refused_in_these_words() -> None:
    with pytest.raises(NoTokenStream, match="the tokens of 2 streams side by side, each with a residual of its own"):
        capture(Joint().eval(), (torch.randn(2, TOKENS, CHANNELS), torch.randn(2, 5, CHANNELS)))
