"""One hand-written forward per architecture: (model, family, methods, inputs) -> (outputs in order, Stream)."""

from oracles.bert import albert, bert, distilbert, mpnet
from oracles.dense import depth_anything, detr, dpt, segformer, timm_maps, yolos
from oracles.hf_plain import hf_plain, vit_mae_pretraining, whisper
from oracles.hf_positions import hf_beit, hf_dinov3, hf_siglip
from oracles.hf_text import clip_text, modernbert, t5
from oracles.hf_vision import clip, hf_vit
from oracles.speech import speech
from oracles.timm_positions import timm_beit, timm_eva
from oracles.timm_vit import timm_vit

FORWARDS = {
    "timm": timm_vit,
    "timm_eva": timm_eva,
    "timm_beit": timm_beit,
    "hf_vit": hf_vit,
    "hf_plain": hf_plain,
    "whisper": whisper,
    "vit_mae_pretraining": vit_mae_pretraining,
    "dpt": dpt,
    "depth_anything": depth_anything,
    "timm_maps": timm_maps,
    "detr": detr,
    "yolos": yolos,
    "segformer": segformer,
    "hf_dinov3": hf_dinov3,
    "hf_beit": hf_beit,
    "hf_siglip": hf_siglip,
    "clip": clip,
    "speech": speech,
    "bert": bert,
    "distilbert": distilbert,
    "albert": albert,
    "mpnet": mpnet,
    "t5": t5,
    "modernbert": modernbert,
    "clip_text": clip_text,
}
