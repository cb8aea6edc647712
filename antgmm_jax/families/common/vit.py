"""The image encoder of CLIP and SigLIP: config conversion and conversion table."""

from collections.abc import Mapping
from typing import Any

from antgmm_jax.config import Act, StackConfig, VisionConfig
from antgmm_jax.families.common.table import Entry, attention, dense, norm


def encoder_of(vision: Mapping[str, Any], layers: int) -> StackConfig:
    """Converts a `vision_config` (with its defaults) to the stack of its first `layers` layers."""
    return StackConfig(
        layers=layers,
        embed=vision["hidden_size"],
        heads=vision["num_attention_heads"],
        head_dim=vision["hidden_size"] // vision["num_attention_heads"],
        mlp=vision["intermediate_size"],
        act=vision["hidden_act"],
        eps=vision["layer_norm_eps"],
    )


def sized_encoder(sizes: tuple[int, int, int, int], head_dim: int, *, act: Act, eps: float) -> StackConfig:
    """Returns the config of an image encoder's stack of given sizes.

    Args:
        sizes: layers, embed, heads, mlp; embed must be heads x head_dim.
        head_dim: width of a head.
        act: activation of the MLPs.
        eps: epsilon of the norms.

    Returns:
        Stack config.
    """
    layers, embed, heads, mlp = sizes
    return StackConfig(layers=layers, embed=embed, heads=heads, mlp=mlp, head_dim=head_dim, act=act, eps=eps)


def vision_config(config: VisionConfig) -> dict[str, Any]:
    """Returns the fields of `vision_config` that depend on the model's shape."""
    stack = config.stack
    return {
        "hidden_size": stack.embed,
        "intermediate_size": stack.mlp,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "num_channels": config.channels,
        "image_size": config.image,
        "patch_size": config.patch,
        "hidden_act": stack.act,
        "layer_norm_eps": stack.eps,
    }


def vision_weights(config: VisionConfig, model: str) -> list[Entry]:
    """Returns the conversion table of an image encoder with prefix `model`."""
    ours, layer = "vision/stack/blocks", model + ".encoder.layers.{i}"
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    heads = {ours_name: f"{layer}.self_attn.{name}" for ours_name, name in names.items()}
    bias = "vision/patch_bias" if config.patch_bias else None
    cls = [Entry(f"{model}.embeddings.class_embedding", ("vision/cls",), "d -> d")] if config.has_cls else []
    return [
        *cls,
        *(norm(f"{model}.pre_layrnorm", "vision/first_norm") if config.first_norm else ()),
        Entry(f"{model}.embeddings.position_embedding.weight", ("vision/positions",), "p d -> p d"),
        *dense(f"{model}.embeddings.patch_embedding", "vision/patch", bias, "d c y x -> c y x d"),
        *attention(heads, f"{ours}/attention", "vision", qkv_bias=True, out_bias=True),
        *norm(f"{layer}.layer_norm1", f"{ours}/norm1", "vision"),
        *norm(f"{layer}.layer_norm2", f"{ours}/norm2", "vision"),
        *dense(f"{layer}.mlp.fc1", f"{ours}/mlp/up", f"{ours}/mlp/up_bias", "m e -> e m", tower="vision"),
        *dense(f"{layer}.mlp.fc2", f"{ours}/mlp/down", f"{ours}/mlp/down_bias", "e m -> m e", tower="vision"),
        *norm(f"{model}.post_layernorm", "vision/final_norm"),
    ]
