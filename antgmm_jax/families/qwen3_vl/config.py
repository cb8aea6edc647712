"""Config of Qwen3-VL, its conversion from and to Hugging Face, and its legal shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from antgmm_jax.axes import axis, part
from antgmm_jax.blocks.packed import PackedConfig, PackedVisionConfig
from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.config import LanguageConfig
from antgmm_jax.families.common.llama import stack_of, text_fields
from antgmm_jax.families.common.qwen import encoder_of, vision_fields
from antgmm_jax.families.qwen3_vl.checks import check
from antgmm_jax.families.rules import Tie, tie_violations

UNITS = "vision/deepstack_mlp"
"""Axis of the hidden units of DeepStack's mergers: one row per layer, of which only those of `taps` are used."""


@dataclass(frozen=True, kw_only=True)
class DeepStackVisionConfig(PackedVisionConfig):
    """A packed vision transformer with DeepStack: mergers with `deepstack_mlp` hidden units each read its `taps`."""

    deepstack_mlp: int = axis(default=0)


@dataclass(frozen=True, kw_only=True)
class Qwen3VLConfig(PackedConfig):
    """A packed vision transformer, mergers of 2 x 2 patches and Qwen3."""

    family: str = "qwen3_vl"
    vision: DeepStackVisionConfig = part("vision", tokens="images")

    @property
    def bridge_tokens(self) -> int:
        """Tokens of the bridge's output for an image slot: of the first merger and of DeepStack's."""
        return 1 + len(self.vision.taps)


def from_hf(hf: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool) -> Qwen3VLConfig:
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
    vision, text = hf["vision_config"], hf["text_config"]
    check(vision, text, raw)
    merge, side = vision["spatial_merge_size"], round(vision["num_position_embeddings"] ** 0.5)
    taps = tuple(vision["deepstack_visual_indexes"])
    inner = merge**2 * vision["hidden_size"]
    decoder = replace(stack_of(text), rope_sections=tuple(text["rope_parameters"]["mrope_section"]), qk_norm=True)
    image = DeepStackVisionConfig(
        stack=encoder_of(vision),
        image=side // merge * merge * vision["patch_size"],
        patch=vision["patch_size"],
        channels=vision["in_channels"],
        merge=merge,
        frames=vision["temporal_patch_size"],
        entries=side**2,
        taps=taps,
        deepstack_mlp=inner if taps else 0,
    )
    return Qwen3VLConfig(
        vision=image,
        bridge=ProjectorConfig(mlp=inner, act="gelu"),
        language=LanguageConfig(decoder=decoder, vocab=text["vocab_size"], tied=tied),
        image_token=hf["image_token_id"],
    )


def to_hf(config: Qwen3VLConfig) -> dict[str, Any]:
    """Returns the fields of config.json that depend on the model's shape."""
    vision, text = config.vision, config.language.decoder
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": config.image_token,
        "tie_word_embeddings": config.language.tied,
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            **vision_fields(vision, text),
            "num_position_embeddings": vision.entries,
            "deepstack_visual_indexes": list(vision.taps),
        },
        "text_config": {
            **text_fields(config.language),
            "model_type": "qwen3_vl_text",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": text.rope_theta,
                "mrope_section": list(text.rope_sections),
                "mrope_interleaved": True,
            },
        },
    }


def ties(config: Qwen3VLConfig) -> tuple[Tie, ...]:
    """Returns the sizes that share one field of config.json."""
    inside = config.vision.merge**2
    mergers = [Tie("bridge/mlp", "vision/embed", inside)]
    if config.vision.deepstack_mlp:
        mergers.append(Tie(UNITS, "vision/embed", inside))
    return (Tie("vision/embed", "vision/heads", config.vision.stack.head_dim), *mergers)


def violations(config: Qwen3VLConfig) -> tuple[str, ...]:
    """Returns the reasons why transformers cannot load this shape; empty if it can."""
    taps, layers, text = config.vision.taps, config.vision.stack.layers, config.language.decoder.layers
    reasons = [*tie_violations(ties(config), config)]
    if len(taps) > layers:
        reasons.append(f"vision/layers = {layers} must be at least {len(taps)}: DeepStack reads as many")
    elif taps and taps[-1] >= layers:
        reasons.append(f"DeepStack reads layer {taps[-1]}, but vision/layers = {layers}")
    if len(taps) > text:
        reasons.append(f"text/layers = {text} must be at least {len(taps)}, the number of DeepStack's mergers")
    return tuple(reasons)
