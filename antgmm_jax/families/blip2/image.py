"""The image side of BLIP-2: config of ViT and Q-Former, its conversion from and to Hugging Face, and its ties."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from antgmm_jax.config import LMMConfig, StackConfig, VisionConfig
from antgmm_jax.families.rules import Tie, check_square


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """A stack of learnt queries with cross-attention to the image encoder, then a linear map to the text width."""

    stack: StackConfig
    queries: int


def vit_of(vision: Mapping[str, Any]) -> VisionConfig:
    """Converts a `vision_config` (with its defaults).

    Raises:
        AntgmmError: images are not square, or not of whole patches.
    """
    check_square(vision["image_size"], vision["patch_size"])
    stack = StackConfig(
        layers=vision["num_hidden_layers"],
        embed=vision["hidden_size"],
        heads=vision["num_attention_heads"],
        head_dim=vision["hidden_size"] // vision["num_attention_heads"],
        mlp=vision["intermediate_size"],
        act=vision["hidden_act"],
        eps=vision["layer_norm_eps"],
        qkv_bias=vision["qkv_bias"],
    )
    return VisionConfig(stack=stack, image=vision["image_size"], patch=vision["patch_size"])


def qformer_of(qformer: Mapping[str, Any]) -> StackConfig:
    """Converts a `qformer_config` (with its defaults) to the stack."""
    return StackConfig(
        layers=qformer["num_hidden_layers"],
        embed=qformer["hidden_size"],
        heads=qformer["num_attention_heads"],
        head_dim=qformer["hidden_size"] // qformer["num_attention_heads"],
        mlp=qformer["intermediate_size"],
        act=qformer["hidden_act"],
        eps=qformer["layer_norm_eps"],
        post_norm=True,
        cross_heads=qformer["num_attention_heads"],
        cross_every=qformer["cross_attention_frequency"],
    )


def vision_config(config: VisionConfig) -> dict[str, Any]:
    """Returns the fields of `vision_config` that depend on the model's shape."""
    vit = config.stack
    return {
        "hidden_size": vit.embed,
        "intermediate_size": vit.mlp,
        "num_hidden_layers": vit.layers,
        "num_attention_heads": vit.heads,
        "image_size": config.image,
        "patch_size": config.patch,
        "hidden_act": vit.act,
        "layer_norm_eps": vit.eps,
        "qkv_bias": vit.qkv_bias,
    }


def qformer_config(queries: StackConfig, memory: int) -> dict[str, Any]:
    """Returns the fields of `qformer_config` that depend on the model's shape; `memory` is the width of the ViT."""
    return {
        "hidden_size": queries.embed,
        "num_hidden_layers": queries.layers,
        "num_attention_heads": queries.heads,
        "intermediate_size": queries.mlp,
        "hidden_act": queries.act,
        "layer_norm_eps": queries.eps,
        "cross_attention_frequency": queries.cross_every,
        "encoder_hidden_size": memory,
    }


def blank(config: Any) -> dict[str, np.ndarray]:
    """Returns a black picture: the PyTorch model needs one even if the text has no place for it.

    Args:
        config: config of the PyTorch model.
    """
    side = config.vision_config.image_size
    return {"pixel_values": np.zeros((1, 3, side, side), np.float32)}


def image_ties(config: LMMConfig) -> tuple[Tie, ...]:
    """Returns the sizes of ViT and Q-Former that share one field of config.json."""
    return (
        Tie("vision/embed", "vision/heads", config.vision.stack.head_dim),
        Tie("bridge/embed", "bridge/heads", config.bridge.stack.head_dim),
        Tie("bridge/cross_heads", "bridge/heads"),
    )
