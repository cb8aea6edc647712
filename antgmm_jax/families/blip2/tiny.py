"""Small BLIP-2 + T5 shapes for the conformance tests."""

import numpy as np

from antgmm_jax.families.base import Tiny


def shapes(seed: int) -> dict[str, Tiny]:
    """Returns named shapes; the seed determines the sizes of the MLPs."""
    rng = np.random.default_rng(seed)
    return {
        "gated": Tiny(_fields(rng, vision=(3, 32, 4), bridge=(4, 32, 4, 2), text=(3, 3, 20, 4)), own_head=True),
        "plain, tied, scaled": Tiny(
            _fields(rng, vision=(2, 32, 4), bridge=(2, 24, 3, 1), text=(3, 1, 16, 2), gated=False, scaled=True)
        ),
        "tied, decoder deeper": Tiny(_fields(rng, vision=(1, 24, 3), bridge=(5, 16, 2, 3), text=(1, 3, 20, 2))),
        "scaled, without biases": Tiny(
            _fields(rng, vision=(2, 16, 2), bridge=(3, 24, 3, 2), text=(2, 2, 12, 3), scaled=True, qkv_bias=False),
            own_head=True,
        ),
    }


def _fields(
    rng: np.random.Generator,
    *,
    vision: tuple[int, int, int],
    bridge: tuple[int, int, int, int],
    text: tuple[int, int, int, int],
    gated: bool = True,
    scaled: bool = False,
    qkv_bias: bool = True,
) -> dict:
    """Tuples: layers, width, heads; the Q-Former also has its cross-attention frequency, T5 two layer counts."""
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "vision_config": {
            "num_hidden_layers": vision[0],
            "hidden_size": vision[1],
            "num_attention_heads": vision[2],
            "intermediate_size": int(rng.integers(17, 41)),
            "image_size": 16,
            "patch_size": 8,
            "qkv_bias": qkv_bias,
        },
        "qformer_config": {
            "num_hidden_layers": bridge[0],
            "hidden_size": bridge[1],
            "num_attention_heads": bridge[2],
            "intermediate_size": int(rng.integers(17, 41)),
            "cross_attention_frequency": bridge[3],
        },
        "text_config": {
            "model_type": "t5",
            "num_layers": text[0],
            "num_decoder_layers": text[1],
            "decoder_layers": text[1],  # of the cache, see `to_hf`
            "d_model": text[2],
            "num_heads": text[3],
            "d_kv": 8,
            "d_ff": int(rng.integers(9, 31)),
            "vocab_size": 160,
            "feed_forward_proj": "gated-gelu" if gated else "relu",
            "tie_word_embeddings": scaled,
            "decoder_start_token_id": 0,
        },
        "num_query_tokens": 3,
        "image_token_index": 3,
    }
