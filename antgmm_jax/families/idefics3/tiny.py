"""Small Idefics3 and SmolVLM shapes for the conformance tests."""

import numpy as np

from antgmm_jax.families.base import Tiny
from antgmm_jax.families.common.llama import small_text
from antgmm_jax.families.idefics3.config import ARCHITECTURES


def shapes(seed: int) -> dict[str, Tiny]:
    """Returns named shapes; the seed determines the sizes of the MLPs."""
    rng = np.random.default_rng(seed)
    return {
        "smolvlm": Tiny(_fields(rng, "smolvlm", vision=(3, 32, 4), text=(3, 24, 4, 2, 10), patch=4, scale=2)),
        "smolvlm, tied": Tiny(
            _fields(rng, "smolvlm", vision=(2, 24, 3), text=(1, 24, 4, 1, 6), patch=2, scale=4, tied=True)
        ),
        "idefics3, biases": Tiny(
            _fields(rng, "idefics3", vision=(1, 16, 2), text=(2, 20, 4, 4, 8), patch=8, scale=2, bias=True)
        ),
        "idefics3, Llama 3.1": Tiny(
            _fields(rng, "idefics3", vision=(1, 16, 2), text=(2, 24, 4, 2, 12), patch=8, scale=2, llama3=True)
        ),
        "idefics3, every patch": Tiny(
            _fields(rng, "idefics3", vision=(2, 24, 3), text=(2, 24, 6, 3, 6), patch=8, scale=1, tied=True)
        ),
    }


def _fields(
    rng: np.random.Generator,
    model_type: str,
    *,
    vision: tuple[int, int, int],
    text: tuple[int, int, int, int, int],
    patch: int,
    scale: int,
    tied: bool = False,
    bias: bool = False,
    llama3: bool = False,
) -> dict:
    """Tuples: layers, width, heads of SigLIP; layers, width, heads, KV heads, head width of Llama."""
    mlp = int(rng.integers(17, 41))
    language = small_text(text, int(rng.integers(17, 41)), tied=tied, bias=bias)
    if llama3:  # frequencies that are kept, mixed and divided
        bands = {"factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        language["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 10000.0, **bands}
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vision_config": {
            "model_type": f"{model_type}_vision",
            "num_hidden_layers": vision[0],
            "hidden_size": vision[1],
            "num_attention_heads": vision[2],
            "intermediate_size": mlp,
            "image_size": 16,
            "patch_size": patch,
        },
        "text_config": language,
        "scale_factor": scale,
        "image_token_id": 3,
        "tie_word_embeddings": tied,
    }
