"""Config of Mistral 3, its conversion from and to Hugging Face, and its legal shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from antgmm_jax.axes import axis, part
from antgmm_jax.blocks.packed import PackedConfig, PackedVisionConfig
from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.config import LanguageConfig, StackConfig, Yarn
from antgmm_jax.families.common.llama import stack_of, text_fields
from antgmm_jax.families.mistral3.checks import check
from antgmm_jax.families.rules import Tie, tie_violations

_EPS = 1e-5  # of the image encoder's norms: not a field of config.json


@dataclass(frozen=True, kw_only=True)
class MergerConfig:
    """A linear map that merges the patches of a square to `mlp` units."""

    mlp: int = axis()


@dataclass(frozen=True, kw_only=True)
class BridgeConfig(ProjectorConfig):
    """A merger and a two-layer MLP from its units to the text width."""

    merger: MergerConfig = part("merger", tokens="images")


@dataclass(frozen=True, kw_only=True)
class Mistral3Config(PackedConfig):
    """Pixtral's vision transformer, a merger of squares of patches, and Mistral or Ministral 3."""

    family: str = "mistral3"
    bridge: BridgeConfig = part("bridge", tokens="images")


def from_hf(hf: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool) -> Mistral3Config:
    """Converts a Hugging Face config.

    Args:
        hf: the Hugging Face config including its defaults.
        raw: config.json as written.
        tied: whether the head shares the token table.

    Returns:
        Model config.

    Raises:
        AntgmmError: the variant is not supported.
    """
    check(hf, raw)
    vision, text, merge = hf["vision_config"], hf["text_config"], hf["spatial_merge_size"]
    square = merge * vision["patch_size"]
    image = PackedVisionConfig(
        stack=_encoder(vision),
        image=vision["image_size"] // square * square,
        patch=vision["patch_size"],
        channels=vision["num_channels"],
        patch_bias=False,
        first_norm=True,
        merge=merge,
        frames=1,
        alternating=True,
    )
    bridge = BridgeConfig(
        mlp=text["hidden_size"],
        act=hf["projector_hidden_act"],
        bias=hf["multimodal_projector_bias"],
        merger=MergerConfig(mlp=vision["hidden_size"]),
    )
    decoder = replace(stack_of({**text, "attention_bias": False}), yarn=_yarn(text["rope_parameters"]))
    return Mistral3Config(
        vision=image,
        bridge=bridge,
        language=LanguageConfig(decoder=decoder, vocab=text["vocab_size"], tied=tied),
        image_token=hf["image_token_index"],
    )


def _encoder(vision: Mapping[str, Any]) -> StackConfig:
    return pixtral(
        StackConfig(
            layers=vision["num_hidden_layers"],
            embed=vision["hidden_size"],
            heads=vision["num_attention_heads"],
            head_dim=vision["hidden_size"] // vision["num_attention_heads"],
            mlp=vision["intermediate_size"],
            act=vision["hidden_act"],
            rope_theta=float(vision["rope_parameters"]["rope_theta"]),
        )
    )


def pixtral(stack: StackConfig) -> StackConfig:
    """Returns a stack with RMSNorm, gated MLPs and rotary positions, without biases."""
    plain = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
    return replace(stack, norm="rms", eps=_EPS, gated=True, positions="rope", **plain)


def _yarn(rope: Mapping[str, Any]) -> Yarn | None:
    if rope["rope_type"] == "default":
        return None
    return Yarn(
        factor=rope["factor"],
        original=rope["original_max_position_embeddings"],
        fast=rope.get("beta_fast") or 32.0,
        slow=rope.get("beta_slow") or 1.0,
        query_growth=rope["llama_4_scaling_beta"],
    )


def to_hf(config: Mistral3Config) -> dict[str, Any]:
    """Returns the fields of config.json that depend on the model's shape."""
    vision, text = config.vision, config.language.decoder
    words = {name: value for name, value in text_fields(config.language).items() if name != "attention_bias"}
    if text.yarn is not None:
        words["rope_parameters"] = _stretched(text.rope_theta, text.yarn)
        # Where vLLM reads the growth of queries.
        growth = {"original_max_position_embeddings": text.yarn.original, "beta": text.yarn.query_growth}
        words["llama_4_scaling"] = growth
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "image_token_index": config.image_token,
        "multimodal_projector_bias": config.bridge.bias,
        "projector_hidden_act": config.bridge.act,
        "spatial_merge_size": vision.merge,
        "tie_word_embeddings": config.language.tied,
        "vision_feature_layer": -1,
        "vision_config": {
            "model_type": "pixtral",
            "head_dim": vision.stack.head_dim,
            "hidden_act": vision.stack.act,
            "hidden_size": vision.stack.embed,
            "image_size": vision.image,
            "intermediate_size": vision.stack.mlp,
            "num_attention_heads": vision.stack.heads,
            "num_channels": vision.channels,
            "num_hidden_layers": vision.stack.layers,
            "patch_size": vision.patch,
            # Newer releases take "default" for the model's own type, "axial", which older ones refuse.
            "rope_parameters": {"rope_type": "default", "rope_theta": vision.stack.rope_theta},
        },
        "text_config": {
            **words,
            "model_type": "mistral" if text.yarn is None else "ministral3",
            "sliding_window": None,
        },
    }


def _stretched(theta: float, yarn: Yarn) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original,
        "beta_fast": yarn.fast,
        "beta_slow": yarn.slow,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": yarn.query_growth,
    }


def ties(config: Mistral3Config) -> tuple[Tie, ...]:
    """Returns the sizes that share one field of config.json."""
    return (
        Tie("vision/embed", "vision/heads", config.vision.stack.head_dim),
        Tie("merger/mlp", "vision/embed"),
        Tie("bridge/mlp", "text/embed"),
    )


def violations(config: Mistral3Config) -> tuple[str, ...]:
    """Returns the reasons why transformers cannot load this shape; empty if it can."""
    return tie_violations(ties(config), config)
