"""Config of LLaVA, its conversion from and to Hugging Face, and its legal shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from antgmm_jax.axes import part
from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.image_side import image_fields, projector_of, vision_of
from antgmm_jax.families.common.text import TextConfig, text_config, text_of


@dataclass(frozen=True, kw_only=True)
class LlavaConfig(LMMConfig):
    """CLIP or SigLIP, a two-layer MLP and a text model."""

    family: str = "llava"
    bridge: ProjectorConfig = part("bridge", tokens="images")
    language: TextConfig


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
        AntgmmError: the variant is not supported.
    """
    if not {"text_config", "vision_config"} & {*raw}:
        raise AntgmmError(
            "config.json has neither text_config nor vision_config, as in checkpoints of the original LLaVA code: use"
            " the conversion to transformers (llava-hf/...-hf)"
        )
    return LlavaConfig(
        vision=vision_of(hf),
        bridge=projector_of(hf),
        language=text_of(hf["text_config"], tied=tied),
        image_token=hf["image_token_index"],
    )


def to_hf(config: LlavaConfig) -> dict[str, Any]:
    """Returns the fields of config.json that depend on the model's shape."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token,
        "image_seq_length": config.image_tokens,
        "tie_word_embeddings": config.language.tied,
        "text_config": text_config(config.language),
        **image_fields(config.vision, config.bridge),
    }
