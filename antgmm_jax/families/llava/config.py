"""Config of LLaVA with CLIP and Llama, its conversion from and to Hugging Face, and its legal shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from antgmm_jax.axes import part
from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.config import LanguageConfig, LMMConfig, VisionConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.llama import decoder_of, head_violations, text_config
from antgmm_jax.families.rules import Tie, check_square, tie_violations
from antgmm_jax.families.vit import encoder_of, vision_config


@dataclass(frozen=True, kw_only=True)
class LlavaConfig(LMMConfig):
    """CLIP, a two-layer MLP and Llama."""

    family: str = "llava"
    bridge: ProjectorConfig = part("bridge", tokens="images")


def from_hf(hf: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool) -> LlavaConfig:
    """Converts a Hugging Face config.

    The image encoder ends at the layer that the projector reads: later layers are never run and not part of the model.

    Args:
        hf: the Hugging Face config including its defaults.
        raw: config.json as written.
        tied: whether the head shares the token table.

    Returns:
        Model config.

    Raises:
        AntgmmError: towers other than CLIP and Llama, several feature layers, or scaled rotary positions.
    """
    vision, text = hf["vision_config"], hf["text_config"]
    for model_type, supported in ((vision["model_type"], "clip_vision_model"), (text["model_type"], "llama")):
        if model_type != supported:
            raise AntgmmError(f"LLaVA with {model_type} is not supported: use LLaVA with clip_vision_model and llama")
    feature_layer = hf["vision_feature_layer"]
    if not isinstance(feature_layer, int):
        raise AntgmmError(f"vision_feature_layer = {feature_layer} is not supported: it must be a single layer")
    layers = vision["num_hidden_layers"]
    used = layers + 1 + feature_layer if feature_layer < 0 else feature_layer
    if not 1 <= used <= layers:
        raise AntgmmError(
            f"vision_feature_layer = {feature_layer} does not exist: the image encoder has {layers} layers"
        )
    check_square(vision["image_size"], vision["patch_size"])
    image = VisionConfig(
        stack=encoder_of(vision, used),
        image=vision["image_size"],
        patch=vision["patch_size"],
        channels=vision["num_channels"],
        patch_bias=False,
        first_norm=True,
        final_norm=False,
        keep_cls=hf["vision_feature_select_strategy"] == "full",
    )
    return LlavaConfig(
        vision=image,
        bridge=ProjectorConfig(
            mlp=text["hidden_size"], act=hf["projector_hidden_act"], bias=hf["multimodal_projector_bias"]
        ),
        language=LanguageConfig(decoder=decoder_of(text), vocab=text["vocab_size"], tied=tied),
        image_token=hf["image_token_index"],
    )


def to_hf(config: LlavaConfig) -> dict[str, Any]:
    """Returns the fields of config.json that depend on the model's shape."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token,
        "image_seq_length": config.image_tokens,
        "multimodal_projector_bias": config.bridge.bias,
        "projector_hidden_act": config.bridge.act,
        "tie_word_embeddings": config.language.tied,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full" if config.vision.keep_cls else "default",
        "vision_config": {"model_type": "clip_vision_model", **vision_config(config.vision)},
        "text_config": text_config(config.language),
    }


def ties(config: LlavaConfig) -> tuple[Tie, ...]:
    """Returns the sizes that share one field of config.json."""
    return (
        Tie("vision/embed", "vision/heads", config.vision.stack.head_dim),
        Tie("bridge/mlp", "text/embed"),
    )


def violations(config: LlavaConfig) -> tuple[str, ...]:
    """Returns the reasons why transformers cannot load this shape; empty if it can."""
    return (*tie_violations(ties(config), config), *head_violations(config))
