"""Small BLIP-2 shapes for the conformance tests."""

from typing import Any

import numpy as np

from antgmm_jax.families.base import Tiny


def shapes(seed: int) -> dict[str, Tiny]:
    """Returns named shapes; the seed determines the sizes of the MLPs."""
    rng = np.random.default_rng(seed)
    gated, deeper = t5(rng, (3, 3, 20, 4)), t5(rng, (1, 3, 20, 2))
    plain, bare = t5(rng, (3, 1, 16, 2), gated=False, scaled=True), t5(rng, (2, 2, 12, 3), scaled=True)
    return {
        "gated": Tiny(_fields(rng, (3, 32, 4), (4, 32, 4, 2), gated), own_head=True),
        "plain, tied, scaled": Tiny(_fields(rng, (2, 32, 4), (2, 24, 3, 1), plain)),
        "tied, decoder deeper": Tiny(_fields(rng, (1, 24, 3), (5, 16, 2, 3), deeper)),
        "scaled, without biases": Tiny(_fields(rng, (2, 16, 2), (3, 24, 3, 2), bare, qkv_bias=False), own_head=True),
        # A smooth activation, because differences are compared with gradients.
        "OPT": Tiny(_fields(rng, (3, 24, 3), (4, 32, 4, 2), opt(rng, (3, 24, 3), act="gelu")), another=True),
        "OPT, a head of its own": Tiny(_fields(rng, (2, 16, 2), (2, 24, 3, 1), opt(rng, (2, 32, 4), tied=False))),
    }


def t5(rng: np.random.Generator, sizes: tuple[int, int, int, int], *, gated: bool = True, scaled: bool = False) -> dict:
    """Returns a small T5 `text_config`: layers of encoder and decoder, width, heads."""
    return {
        "model_type": "t5",
        "num_layers": sizes[0],
        "num_decoder_layers": sizes[1],
        "decoder_layers": sizes[1],  # of the cache, see `antgmm_jax.families.common.t5.text_config`
        "d_model": sizes[2],
        "num_heads": sizes[3],
        "d_kv": 8,
        "d_ff": int(rng.integers(9, 31)),
        "vocab_size": 160,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": scaled,
        "decoder_start_token_id": 0,
    }


def opt(rng: np.random.Generator, sizes: tuple[int, int, int], *, act: str = "relu", tied: bool = True) -> dict:
    """Returns a small OPT `text_config`: layers, width, heads."""
    return {
        "model_type": "opt",
        "num_hidden_layers": sizes[0],
        "hidden_size": sizes[1],
        "num_attention_heads": sizes[2],
        "ffn_dim": int(rng.integers(17, 41)),
        "activation_function": act,
        "max_position_embeddings": 64,
        "vocab_size": 160,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 4,
    }


def _fields(
    rng: np.random.Generator,
    vision: tuple[int, int, int],
    bridge: tuple[int, int, int, int],
    text: dict[str, Any],
    *,
    qkv_bias: bool = True,
) -> dict:
    """Tuples: layers, width, heads; the Q-Former also has its cross-attention frequency."""
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        **image_fields(rng, vision, bridge, qkv_bias=qkv_bias),
        "text_config": text,
        "num_query_tokens": 3,
        "image_token_index": 3,
    }


def image_fields(
    rng: np.random.Generator, vision: tuple[int, int, int], bridge: tuple[int, int, int, int], *, qkv_bias: bool = True
) -> dict:
    """Returns small `vision_config` and `qformer_config`; tuples as above."""
    return {
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
    }
