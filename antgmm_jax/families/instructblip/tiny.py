"""Small InstructBLIP shapes for the conformance tests."""

from typing import Any

import numpy as np

from antgmm_jax.families.base import Tiny
from antgmm_jax.families.blip2.tiny import image_fields, t5
from antgmm_jax.families.common.llama import small_text


def shapes(seed: int) -> dict[str, Tiny]:
    """Returns named shapes; the seed determines the sizes of the MLPs."""
    rng = np.random.default_rng(seed)
    gated, plain = t5(rng, (3, 3, 20, 4)), t5(rng, (2, 2, 16, 2), gated=False, scaled=True)
    return {
        "T5": Tiny(_fields(rng, (3, 32, 4), (4, 32, 4, 2), gated), own_head=True),
        "T5, plain, every layer reads the image": Tiny(_fields(rng, (2, 32, 4), (2, 24, 3, 1), plain)),
        "Llama": Tiny(_fields(rng, (3, 24, 3), (4, 32, 4, 2), _llama(rng, (3, 24, 4, 4, 6))), another=True),
        "Llama, tied, without biases": Tiny(
            _fields(rng, (2, 16, 2), (5, 24, 3, 3), _llama(rng, (2, 24, 4, 2, 8), tied=True), qkv_bias=False)
        ),
    }


def _llama(rng: np.random.Generator, sizes: tuple[int, int, int, int, int], *, tied: bool = False) -> dict:
    return small_text(sizes, int(rng.integers(17, 41)), tied=tied, bias=False)


def _fields(
    rng: np.random.Generator,
    vision: tuple[int, int, int],
    bridge: tuple[int, int, int, int],
    text: dict[str, Any],
    *,
    qkv_bias: bool = True,
) -> dict:
    """Tuples: layers, width, heads; the Q-Former also has its cross-attention frequency."""
    fields = image_fields(rng, vision, bridge, qkv_bias=qkv_bias)
    fields["qformer_config"] |= {"vocab_size": 40, "max_position_embeddings": 14}
    return {
        "architectures": ["InstructBlipForConditionalGeneration"],
        "model_type": "instructblip",
        **fields,
        "text_config": text,
        "num_query_tokens": 3,
        "image_token_index": 3,
    }
