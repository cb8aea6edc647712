"""Small InternVL shapes for the conformance tests."""

from typing import Any

import numpy as np

from antgmm_jax.families.base import Tiny
from antgmm_jax.families.common.llama import small_text


def shapes(seed: int) -> dict[str, Tiny]:
    """Returns named shapes; the seed determines the sizes of the MLPs."""
    rng = np.random.default_rng(seed)
    return {
        "Qwen2": Tiny(_fields(rng, vision=(3, 24, 3), text=(3, 24, 4, 2, 6))),
        "Qwen3, tied, every patch": Tiny(
            _fields(rng, vision=(2, 16, 2), text=(2, 20, 6, 3, 8), patch=8, scale=1, kind="qwen3", tied=True, dynamic=2)
        ),
        "Llama, RMSNorm, no biases, first layer": Tiny(
            _fields(rng, vision=(2, 32, 4), text=(2, 24, 4, 2, 10), patch=2, scale=4, kind="llama", bare=True)
        ),
    }


def _fields(
    rng: np.random.Generator,
    *,
    vision: tuple[int, int, int],
    text: tuple[int, int, int, int, int],
    patch: int = 4,
    scale: int = 2,
    kind: str = "qwen2",
    tied: bool = False,
    bare: bool = False,
    dynamic: float = 0.0,
) -> dict[str, Any]:
    """Tuples: layers, width, heads of InternViT; layers, width, heads, KV heads, head width of the text model."""
    language = small_text(text, int(rng.integers(17, 41)), tied=tied, model_type=kind)
    if dynamic:
        language["rope_parameters"] |= {"rope_type": "dynamic", "factor": dynamic}
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": {
            "model_type": "internvl_vision",
            "num_hidden_layers": vision[0],
            "hidden_size": vision[1],
            "num_attention_heads": vision[2],
            "intermediate_size": int(rng.integers(17, 41)),
            "image_size": [16, 16],
            "patch_size": [patch, patch],
            "attention_bias": not bare,
            "norm_type": "rms_norm" if bare else "layer_norm",
        },
        "text_config": language,
        "downsample_ratio": 1 / scale,
        "image_seq_length": (16 // patch // scale) ** 2,
        "image_token_id": 3,
        "vision_feature_layer": 1 if bare else -1,
        "tie_word_embeddings": tied,
    }
