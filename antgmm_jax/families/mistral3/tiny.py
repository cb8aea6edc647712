"""Small Mistral 3 shapes for the conformance tests."""

import numpy as np

from antgmm_jax.families.base import Tiny
from antgmm_jax.families.common.llama import small_text

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 1.5,
    "beta_slow": 0.05,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}


def shapes(seed: int) -> dict[str, Tiny]:
    """Shapes by name; the seed draws the sizes of the feed-forward layers."""
    rng = np.random.default_rng(seed)
    return {
        "Mistral, biases": Tiny(_fields(rng, vision=(3, 24, 3), text=(3, 20, 4, 2, 6), bias=True)),
        "Ministral, tied": Tiny(
            _fields(rng, vision=(2, 8, 2), text=(4, 12, 3, 1, 16), rope=_YARN, tied=True, patch=6, image=30)
        ),
        "Ministral, 3 x 3 patches": Tiny(
            _fields(rng, vision=(2, 32, 4), text=(2, 16, 2, 2, 10), rope=_YARN, tied=True, merge=3), own_head=True
        ),
    }


def _fields(
    rng: np.random.Generator,
    *,
    vision: tuple[int, int, int],
    text: tuple[int, int, int, int, int],
    rope: dict | None = None,
    merge: int = 2,
    patch: int = 4,
    image: int = 36,
    tied: bool = False,
    bias: bool = False,
) -> dict:
    """Layers, width and heads of the ViT; layers, width, heads, KV heads, head width of the text model."""
    words = small_text(text, int(rng.integers(17, 41)), tied=tied, bias=False)
    own = {"model_type": "mistral"} if rope is None else {"model_type": "ministral3", "rope_parameters": dict(rope)}
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "vision_config": {
            "model_type": "pixtral",
            "num_hidden_layers": vision[0],
            "hidden_size": vision[1],
            "num_attention_heads": vision[2],
            "intermediate_size": int(rng.integers(17, 41)),
            "image_size": image,
            "patch_size": patch,
            "hidden_act": "silu",
        },
        "text_config": {
            **{name: value for name, value in words.items() if name != "attention_bias"},
            "sliding_window": None,
            **own,
        },
        "image_token_index": 3,
        "spatial_merge_size": merge,
        "multimodal_projector_bias": bias,
        "tie_word_embeddings": tied,
    }
