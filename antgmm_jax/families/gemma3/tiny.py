"""Small Gemma 3 shapes for the conformance tests."""

import numpy as np

from antgmm_jax.families.base import Tiny
from antgmm_jax.families.common.llama import small_text

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def shapes(seed: int) -> dict[str, Tiny]:
    """Returns named shapes; the seed determines the sizes of the MLPs."""
    rng = np.random.default_rng(seed)
    both = (_LOCAL, _GLOBAL, _LOCAL)
    return {
        "local and global": Tiny(_fields(rng, vision=(3, 16, 2), text=(3, 24, 4, 2, 10), kinds=both, window=5)),
        "scaled positions, 1 KV head": Tiny(
            _fields(rng, vision=(2, 24, 3), text=(2, 24, 4, 1, 6), kinds=(_GLOBAL, _LOCAL), window=3, factor=8.0)
        ),
        "global only, a head of its own, biases": Tiny(
            _fields(rng, vision=(1, 16, 2), text=(1, 20, 4, 4, 8), kinds=(_GLOBAL,), side=4, tied=False, bias=True)
        ),
        "local only, a token per image": Tiny(
            _fields(rng, vision=(2, 24, 3), text=(2, 24, 6, 3, 6), kinds=(_LOCAL, _LOCAL), window=2, side=1)
        ),
    }


def _fields(
    rng: np.random.Generator,
    *,
    vision: tuple[int, int, int],
    text: tuple[int, int, int, int, int],
    kinds: tuple[str, ...],
    window: int = 4,
    side: int = 2,
    factor: float = 1.0,
    tied: bool = True,
    bias: bool = False,
) -> dict:
    """Tuples: layers, width, heads of SigLIP; layers, width, heads, KV heads, head width of Gemma."""
    scaling = {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "num_hidden_layers": vision[0],
            "hidden_size": vision[1],
            "num_attention_heads": vision[2],
            "intermediate_size": int(rng.integers(17, 41)),
            "image_size": 16,
            "patch_size": 4,
            "vision_use_head": False,
        },
        "text_config": {
            **small_text(text, int(rng.integers(17, 41)), tied=tied, bias=bias),
            "model_type": "gemma3_text",
            "query_pre_attn_scalar": 8 * text[4] + 1,
            "sliding_window": window,
            "layer_types": [*kinds],
            "rope_parameters": {
                _GLOBAL: {"rope_theta": 500.0, **scaling},
                _LOCAL: {"rope_theta": 100.0, "rope_type": "default"},
            },
        },
        "mm_tokens_per_image": side**2,
        "image_token_index": 3,
        "tie_word_embeddings": tied,
    }
