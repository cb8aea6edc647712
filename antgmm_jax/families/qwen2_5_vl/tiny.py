"""Small Qwen2.5-VL shapes for the conformance tests."""

import numpy as np

from antgmm_jax.families.base import Tiny
from antgmm_jax.families.common.llama import small_text


def shapes(seed: int) -> dict[str, Tiny]:
    """Shapes by name; the seed draws the sizes of the feed-forward layers."""
    rng = np.random.default_rng(seed)
    return {
        "windows of four squares": Tiny(
            _fields(rng, vision=(4, 8, 2, (1, 3)), text=(3, 24, 4, 2), sections=(1, 1, 1), window=16)
        ),
        "windows of one square, tied": Tiny(
            _fields(rng, vision=(3, 24, 2, (0,)), text=(2, 32, 4, 4), sections=(2, 1, 1), window=11, tied=True)
        ),
        "windows only, wide patches": Tiny(
            _fields(rng, vision=(2, 16, 4, ()), text=(2, 36, 6, 3), sections=(1, 0, 2), window=30, patch=6, tied=True),
            own_head=True,
        ),
    }


def _fields(
    rng: np.random.Generator,
    *,
    vision: tuple[int, int, int, tuple[int, ...]],
    text: tuple[int, int, int, int],
    sections: tuple[int, int, int],
    window: int,
    patch: int = 4,
    tied: bool = False,
) -> dict:
    """Layers, width, heads and full layers of the ViT; layers, width, heads and KV heads of Qwen2."""
    words = small_text((*text, 0), int(rng.integers(17, 41)), tied=tied, bias=True)
    rope = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": list(sections)}
    # Official files name the tie at the top only, those that transformers has written again in both places.
    fixed = {"head_dim", "attention_bias", *([] if tied else ["tie_word_embeddings"])}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vision_config": {
            "model_type": "qwen2_5_vl_vision",
            "depth": vision[0],
            "hidden_size": vision[1],
            "num_heads": vision[2],
            "fullatt_block_indexes": list(vision[3]),
            "intermediate_size": int(rng.integers(17, 41)),
            "out_hidden_size": text[1],
            "patch_size": patch,
            "window_size": window,
        },
        "text_config": {
            **{name: value for name, value in words.items() if name not in fixed},
            "model_type": "qwen2_5_vl_text",
            "rope_parameters": rope,
        },
        "image_token_id": 3,
        "tie_word_embeddings": tied,
    }
