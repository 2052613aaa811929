"""Speech encoders on raw waves in the zoo: convolutions, then a transformer over frames."""

from __future__ import annotations

from typing import Any

from family import Family
from torch import Tensor, nn
from zoo_hf import SIZES, hf, random_inputs

WAVE = random_inputs(input_values=(400,))  # 19 frames
FRAMES = {
    "num_feat_extract_layers": 2,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (10, 2),
    "num_conv_pos_embedding_groups": 4,
}
PLACES = {"num_conv_pos_embeddings": 16}  # channels of a kernel in most, layers in Data2Vec


class Frames(nn.Module):
    """The frames of an encoder alone: what else it gives does not depend on its layers."""

    def __init__(self, speech: nn.Module) -> None:
        super().__init__()
        self.speech = speech

    def forward(self, input_values: Tensor) -> Tensor:
        """Waves [B, 400] -> [B, 19, C]."""
        return self.speech(input_values).last_hidden_state


def _speech(name: str, model: str, **options: Any) -> Family:
    config = model.replace("Model", "Config")
    build = hf(model, config, **SIZES, **{**FRAMES, **PLACES, **options})
    return Family(name, lambda layers: Frames(build(layers)), WAVE, 0, 19, layers=2, oracle="speech", without=("evit",))


SPEECH = (
    _speech("wav2vec2", "Wav2Vec2Model"),
    _speech("wav2vec2_stable", "Wav2Vec2Model", do_stable_layer_norm=True, feat_extract_norm="layer"),
)

ALIKE = (  # Wav2Vec2 but for the convolutions in front, and tested less
    _speech("hubert", "HubertModel"),
    _speech("data2vec_audio", "Data2VecAudioModel", num_conv_pos_embeddings=2, conv_pos_kernel_size=3),
)
