"""Small LLaVA shapes for the conformance tests."""

from typing import Any

import numpy as np

from antgmm_jax.families.base import Tiny
from antgmm_jax.families.common.image_side import CLIP, SIGLIP
from antgmm_jax.families.common.llama import small_text


def shapes(seed: int) -> dict[str, Tiny]:
    """Returns named shapes; the seed determines the sizes of the MLPs."""
    rng = np.random.default_rng(seed)
    return {
        "2 KV heads": Tiny(_fields(rng, vision=(4, 32, 4), text=(3, 24, 4, 2, 10))),
        "1 KV head, tied": Tiny(_fields(rng, vision=(2, 24, 3), text=(2, 24, 4, 1, 6), tied=True, feature_layer=-1)),
        "4 KV heads, biases, all tokens": Tiny(
            _fields(rng, vision=(3, 16, 2), text=(2, 20, 4, 4, 8), bias=True, whole=True, feature_layer=2)
        ),
        "6 heads in 3 groups, first layer": Tiny(
            _fields(rng, vision=(3, 24, 3), text=(1, 24, 6, 3, 6), feature_layer=1, act="gelu_pytorch_tanh")
        ),
        "SigLIP, Qwen2, tied": Tiny(
            _siglip(rng, vision=(3, 24, 3), text=(3, 24, 4, 2, 6), kind="qwen2", tied=True),
        ),
        "CLIP, Qwen3": Tiny(
            _fields(rng, vision=(2, 16, 2), text=(2, 20, 6, 3, 8), kind="qwen3", feature_layer=-1, bias=True)
        ),
        "SigLIP with its head, Mistral": Tiny(
            _siglip(rng, head=True, vision=(2, 32, 4), text=(2, 20, 6, 2, 10), kind="mistral", feature_layer=-1)
        ),
    }


def _fields(
    rng: np.random.Generator,
    *,
    vision: tuple[int, int, int],
    text: tuple[int, int, int, int, int],
    kind: str = "llama",
    tied: bool = False,
    bias: bool = False,
    whole: bool = False,
    feature_layer: int = -2,
    act: str = "gelu",
) -> dict[str, Any]:
    """Tuples: layers, width, heads of CLIP; layers, width, heads, KV heads, head width of the text model."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vision_config": {
            "model_type": CLIP,
            "num_hidden_layers": vision[0],
            "hidden_size": vision[1],
            "num_attention_heads": vision[2],
            "intermediate_size": int(rng.integers(17, 41)),
            "image_size": 16,
            "patch_size": 8,
        },
        "text_config": small_text(text, int(rng.integers(17, 41)), tied=tied, bias=bias, model_type=kind),
        "image_token_index": 3,
        "image_seq_length": 4 + whole,
        "projector_hidden_act": act,
        "vision_feature_layer": feature_layer,
        "vision_feature_select_strategy": "full" if whole else "default",
        "tie_word_embeddings": tied,
    }


def _siglip(rng: np.random.Generator, *, head: bool = False, **sizes: Any) -> dict[str, Any]:
    """The same with SigLIP in place of CLIP, with the head that pools its states or without."""
    fields = _fields(rng, whole=True, **sizes)
    fields["vision_config"] |= {"model_type": SIGLIP, "vision_use_head": head}
    return {**fields, "image_seq_length": 4}
