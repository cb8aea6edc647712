"""Config of Idefics3 and SmolVLM, its conversion from and to Hugging Face, and its legal shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from antgmm_jax.axes import part
from antgmm_jax.config import LMMConfig, VisionConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.text import TextConfig, text_config, text_of, text_violations
from antgmm_jax.families.common.vit import encoder_of, vision_config
from antgmm_jax.families.rules import Tie, check_square, tie_violations

ARCHITECTURES = {"idefics3": "Idefics3ForConditionalGeneration", "smolvlm": "SmolVLMForConditionalGeneration"}
"""`model_type` -> class in transformers. Both compute the same; their processors differ."""


@dataclass(frozen=True, kw_only=True)
class ShuffleConfig:
    """Concatenates squares of `scale` x `scale` image states and maps them to the text width."""

    scale: int


@dataclass(frozen=True, kw_only=True)
class Idefics3Config(LMMConfig):
    """SigLIP, pixel shuffle with one linear map, and Llama; each tile of an image occupies one slot."""

    family: str = "idefics3"
    model_type: Literal["idefics3", "smolvlm"]
    bridge: ShuffleConfig = part("bridge", tokens="images")
    language: TextConfig

    @property
    def image_tokens(self) -> int:
        """Text positions that one tile occupies."""
        return self.vision.patches // self.bridge.scale**2


def from_hf(hf: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool) -> Idefics3Config:
    """Converts a Hugging Face config.

    Args:
        hf: the Hugging Face config including its defaults.
        raw: config.json as written.
        tied: whether the head shares the token table.

    Returns:
        Model config.

    Raises:
        AntgmmError: a language model other than Llama, or a number of patches that the pixel shuffle cannot split.
    """
    vision, text, scale = hf["vision_config"], hf["text_config"], hf["scale_factor"]
    check_square(vision["image_size"], vision["patch_size"])
    side = vision["image_size"] // vision["patch_size"]
    if side % scale:
        raise AntgmmError(f"scale_factor = {scale} does not divide the {side} patches per side: correct config.json")
    image = VisionConfig(
        stack=encoder_of(vision, vision["num_hidden_layers"]),
        image=vision["image_size"],
        patch=vision["patch_size"],
        channels=vision["num_channels"],
        has_cls=False,
    )
    return Idefics3Config(
        model_type=hf["model_type"],
        vision=image,
        bridge=ShuffleConfig(scale=scale),
        language=text_of(text, tied=tied, types=("llama",)),
        image_token=hf["image_token_id"],
    )


def to_hf(config: Idefics3Config) -> dict[str, Any]:
    """Returns the fields of config.json that depend on the model's shape."""
    return {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "image_token_id": config.image_token,
        "scale_factor": config.bridge.scale,
        "tie_word_embeddings": config.language.tied,
        "vision_config": {"model_type": f"{config.model_type}_vision", **vision_config(config.vision)},
        "text_config": text_config(config.language),
    }


def ties(config: Idefics3Config) -> tuple[Tie, ...]:
    """Returns the sizes that share one field of config.json."""
    return (Tie("vision/embed", "vision/heads", config.vision.stack.head_dim),)


def violations(config: Idefics3Config) -> tuple[str, ...]:
    """Returns the reasons why transformers cannot load this shape; empty if it can."""
    return (*tie_violations(ties(config), config), *text_violations(config))
