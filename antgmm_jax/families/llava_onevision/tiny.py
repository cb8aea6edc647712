"""Small LLaVA-OneVision shapes for the conformance tests."""

from typing import Any

import numpy as np

from antgmm_jax.families.base import Tiny
from antgmm_jax.families.common.image_side import SIGLIP
from antgmm_jax.families.common.llama import small_text

_SIDES = (1, 2, 3)


def shapes(seed: int) -> dict[str, Tiny]:
    """Returns named shapes; the seed determines the sizes of the MLPs."""
    rng = np.random.default_rng(seed)
    return {
        "Qwen2": Tiny(_fields(rng, vision=(3, 24, 3), text=(3, 24, 4, 2, 6), most=9)),
        "shrunk, tied, rest of a patch": Tiny(
            _fields(rng, vision=(2, 16, 2), text=(2, 32, 4, 2, 8), most=1, image=18, tied=True, feature_layer=-2)
        ),
        "Qwen3, tiles of 4 patches": Tiny(
            _fields(rng, vision=(2, 16, 2), text=(2, 20, 6, 3, 8), most=2, patch=8, kind="qwen3")
        ),
    }


def _fields(
    rng: np.random.Generator,
    *,
    vision: tuple[int, int, int],
    text: tuple[int, int, int, int, int],
    most: int,
    image: int = 16,
    patch: int = 4,
    kind: str = "qwen2",
    tied: bool = False,
    feature_layer: int = -1,
) -> dict[str, Any]:
    """Tuples: layers, width, heads of the image encoder; layers, width, heads, KV heads, head width of the text."""
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "vision_config": {
            "model_type": SIGLIP,
            "num_hidden_layers": vision[0],
            "hidden_size": vision[1],
            "num_attention_heads": vision[2],
            "intermediate_size": int(rng.integers(17, 41)),
            "image_size": image,
            "patch_size": patch,
            "vision_use_head": False,
        },
        "text_config": small_text(text, int(rng.integers(17, 41)), tied=tied, model_type=kind),
        "image_grid_pinpoints": [[image * high, image * wide] for high in _SIDES for wide in _SIDES],
        "image_token_index": 3,
        "video_token_index": 159,
        "vision_aspect_ratio": f"anyres_max_{most}",
        "vision_feature_layer": feature_layer,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": tied,
    }
