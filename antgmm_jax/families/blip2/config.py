"""Config of BLIP-2 with T5 or OPT, its conversion from and to Hugging Face, and its legal shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from antgmm_jax.axes import part
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.blip2.image import (
    QFormerConfig,
    image_ties,
    qformer_config,
    qformer_of,
    vision_config,
    vit_of,
)
from antgmm_jax.families.common.languages import (
    image_token_of,
    language_fields,
    language_of,
    language_ties,
    language_violations,
)
from antgmm_jax.families.rules import Tie, tie_violations


@dataclass(frozen=True, kw_only=True)
class Blip2Config(LMMConfig):
    """ViT, Q-Former, and T5 or OPT."""

    family: str = "blip2"
    bridge: QFormerConfig = part("bridge", tokens="images", memory="vision/embed", reads="vision/out")

    @property
    def image_tokens(self) -> int:
        """Text positions that one image occupies: one per query."""
        return self.bridge.queries


def from_hf(hf: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool) -> Blip2Config:
    """Converts a Hugging Face config.

    Args:
        hf: the Hugging Face config including its defaults.
        raw: config.json as written: only it holds T5's head scale.
        tied: whether the head shares the token table.

    Returns:
        Model config.

    Raises:
        AntgmmError: a language model other than T5 and OPT, a Q-Former that reads text, or an image token without a
            row in the token table.
    """
    qformer = hf["qformer_config"]
    language = language_of(hf, raw, tied=tied, kinds=("t5", "opt"))
    if qformer["use_qformer_text_input"]:
        raise AntgmmError(
            "use_qformer_text_input = true is not supported: use InstructBLIP, of model_type instructblip"
        )
    return Blip2Config(
        vision=vit_of(hf["vision_config"]),
        bridge=QFormerConfig(stack=qformer_of(qformer), queries=hf["num_query_tokens"]),
        language=language,
        image_token=image_token_of(hf, language),
    )


def to_hf(config: Blip2Config) -> dict[str, Any]:
    """Returns the fields of config.json that depend on the model's shape."""
    qformer = qformer_config(config.bridge.stack, config.vision.stack.embed)
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "image_token_index": config.image_token,
        "is_encoder_decoder": config.encoder_decoder,
        "num_query_tokens": config.bridge.queries,
        "vision_config": {"model_type": "blip_2_vision_model", **vision_config(config.vision)},
        "qformer_config": {"model_type": "blip_2_qformer", "use_qformer_text_input": False, **qformer},
        **language_fields(config.language),
    }


def ties(config: Blip2Config) -> tuple[Tie, ...]:
    """Returns the sizes that share one field of config.json."""
    return (*image_ties(config), *language_ties(config.language))


def violations(config: Blip2Config) -> tuple[str, ...]:
    """Returns the reasons why transformers cannot load this shape; empty if it can."""
    return (*tie_violations(ties(config), config), *language_violations(config))
