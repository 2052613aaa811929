"""One hand-written forward per architecture: (model, family, methods, inputs) -> (outputs in order, Stream)."""

from oracles.bert import bert
from oracles.hf_vision import clip, hf_vit
from oracles.timm_vit import timm_vit

FORWARDS = {"timm": timm_vit, "hf_vit": hf_vit, "clip": clip, "bert": bert}
