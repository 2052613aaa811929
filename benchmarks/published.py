"""What the published tables say of each method on the models of their papers: to compare orders, never numbers.

From the method cards; "GMACs" count a multiplication with its addition once.
"""

from __future__ import annotations

PUBLISHED = {
    "tome": "ViT-S/16 (AugReg), untrained, r=13: 81.41 to 79.30%, 953 to 1564 images/s on a V100; ViT-B/16 r=13: "
    "84.57 to 82.60%, 309 to 511",
    "pitome": "DeiT-S, untrained, 4.6 to 2.9 GMACs: 79.8 to 79.1% (ToMe there 77.7%); MAE ViT-L, 61.6 to 31.0: 85.7 to "
    "84.6%",
    "tofu": "DeiT-S, untrained, 4.6 to 2.9 GMACs: 79.8 to 77.8% (PiToMe's port of it)",
    "diffrate": "DeiT-S, untrained, 4.6 to 2.9 GMACs: 79.8 to 76.8% (PiToMe's port of it)",
    "mctf": "no figure of a run without training is known to us",
    "evit": "DeiT-S, trained with it, keep_ratio=0.7: 79.8 to 79.5% at 3.0 of 4.6 GMACs; 0.5: 78.5% at 2.3",
    "random": "DeiT-S at about 3 of 4.6 GMACs: 3.0 points lost (Zero-TPrune's table)",
    "radial": "the content-free control of Haurum et al.; no figure is known to us",
    "zero-tprune": "DeiT-S, untrained, 34.7% fewer FLOPs: 0.4 points lost, 45.3% more images/s on an A100",
    "ats": "ImageNet and Kinetics, half of the GFLOPs at about the same accuracy (abstract); no throughput given",
    "avit": "A-ViT-T, trained with it: 71.4% at 0.8 GMACs",
    "dynamicvit": "DeiT-S, trained with it, 0.7: 79.32% at 2.9 of 4.6 GMACs; DeiT-B 81.43% at 11.4",
    "dtem": "no figure is known to us",
    "clca": "trained on sets of fine-grained classes; no figure without training",
    "pool": "LLaVA-1.5, trained with it: about 9 of 576 visual tokens keep COCO-style benchmarks; untrained it is the "
    "weak baseline",
    "tomesd": "Stable Diffusion 1.5, 512 pixels, ratio 0.5: 3.09 to 1.65 s per image (RTX 4090), FID 33.12 to 33.02",
    "focus-detr": "COCO 50.4 AP, trained with it (2.2 over sparse detectors of its kind)",
    "token-shuffle": "2.7 billion Llama at 2048 pixels, trained with it: GenAI-Bench (hard) 0.77",
}
