"""LLaVA with CLIP and Llama: its config, from and to Hugging Face's, and its legal shapes."""

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
    """CLIP, a two-layer perceptron and Llama."""

    family: str = "llava"
    bridge: ProjectorConfig = part("bridge", tokens="images")


def from_hf(hf: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool) -> LlavaConfig:
    """Our config of a Hugging Face one.

    The feature layer that the projector reads ends the image encoder: layers after it are never run and are not
    part of the model.

    Args:
        hf: the config with its defaults filled in.
        raw: config.json as it stands.
        tied: whether the file's head is the token table.

    Returns:
        The config.

    Raises:
        AntgmmError: towers other than CLIP and Llama, several feature layers, or scaled rotary positions.
    """
    vision, text = hf["vision_config"], hf["text_config"]
    for got, need in ((vision["model_type"], "clip_vision_model"), (text["model_type"], "llama")):
        if got != need:
            raise AntgmmError(f"LLaVA with {got} is not supported: bring LLaVA with clip_vision_model and llama")
    at = hf["vision_feature_layer"]
    if not isinstance(at, int):
        raise AntgmmError(f"vision_feature_layer = {at} joins several layers: only one layer is supported")
    used = vision["num_hidden_layers"] + 1 + at if at < 0 else at
    if not 1 <= used <= vision["num_hidden_layers"]:
        raise AntgmmError(f"vision_feature_layer = {at} is not a layer of {vision['num_hidden_layers']}")
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
    """The fields of config.json that the model's shape decides."""
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
    """Counts that one field of config.json holds for several axes."""
    return (
        Tie("vision/embed", "vision/heads", config.vision.stack.head_dim),
        Tie("bridge/mlp", "text/embed"),
    )


def violations(config: LlavaConfig) -> tuple[str, ...]:
    """What keeps a shape from being served, each as a sentence; empty where nothing does."""
    return (*tie_violations(ties(config), config), *head_violations(config))
