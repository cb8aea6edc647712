"""Small Qwen3-VL shapes for the conformance tests."""

import numpy as np

from antgmm_jax.families.base import Tiny
from antgmm_jax.families.common.llama import small_text


def shapes(seed: int) -> dict[str, Tiny]:
    """Shapes by name; the seed draws the sizes of the feed-forward layers."""
    rng = np.random.default_rng(seed)
    return {
        "two mergers": Tiny(_fields(rng, vision=(4, 8, 2, (1, 2)), text=(5, 20, 4, 2, 12), sections=(2, 2, 2))),
        "one merger, tied": Tiny(
            _fields(rng, vision=(3, 24, 2, (1,)), text=(2, 12, 3, 1, 8), sections=(2, 1, 1), entries=9, tied=True)
        ),
        "a merger at every layer, biases": Tiny(
            _fields(rng, vision=(3, 8, 2, (0, 1, 2)), text=(4, 16, 3, 3, 16), sections=(4, 2, 2), patch=2, bias=True)
        ),
        "no DeepStack": Tiny(
            _fields(rng, vision=(2, 16, 2, ()), text=(2, 24, 4, 4, 6), sections=(1, 1, 1), entries=25, tied=True),
            own_head=True,
        ),
    }


def _fields(
    rng: np.random.Generator,
    *,
    vision: tuple[int, int, int, tuple[int, ...]],
    text: tuple[int, int, int, int, int],
    sections: tuple[int, int, int],
    entries: int = 16,
    patch: int = 4,
    tied: bool = False,
    bias: bool = False,
) -> dict:
    """Layers, width, heads and DeepStack's layers of the ViT; layers, width, heads, KV heads, head width of Qwen3."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "depth": vision[0],
            "hidden_size": vision[1],
            "num_heads": vision[2],
            "deepstack_visual_indexes": list(vision[3]),
            "intermediate_size": int(rng.integers(17, 41)),
            "out_hidden_size": text[1],
            "patch_size": patch,
            "num_position_embeddings": entries,
        },
        "text_config": {
            **small_text(text, int(rng.integers(17, 41)), tied=tied, bias=bias),
            "model_type": "qwen3_vl_text",
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": list(sections)},
        },
        "image_token_id": 3,
        "tie_word_embeddings": tied,
    }
