"""Config of InstructBLIP with T5 or Llama, its conversion from and to Hugging Face, and its legal shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from antgmm_jax.axes import part
from antgmm_jax.config import LanguageConfig, LMMConfig
from antgmm_jax.families.blip2.image import QFormerConfig, image_ties, qformer_config, qformer_of, vision_config, vit_of
from antgmm_jax.families.common.languages import (
    image_token_of,
    language_fields,
    language_of,
    language_ties,
    language_violations,
)
from antgmm_jax.families.common.text import TextConfig
from antgmm_jax.families.rules import Tie, tie_violations

LONGEST = 128
"""Tokens of the longest instruction, as in the released models' training."""


@dataclass(frozen=True, kw_only=True)
class InstructQFormerConfig(QFormerConfig):
    """A Q-Former that reads an instruction with its queries.

    `words` is the size of its own token table, `positions` that of its table of positions.
    """

    words: int
    positions: int


@dataclass(frozen=True, kw_only=True)
class InstructBlipConfig(LMMConfig):
    """ViT, a Q-Former that reads the instruction, and T5 or Llama."""

    family: str = "instructblip"
    bridge: InstructQFormerConfig = part("bridge", tokens="images", memory="vision/embed", reads="vision/out")
    language: LanguageConfig | TextConfig

    @property
    def image_tokens(self) -> int:
        """Text positions that one image occupies: one per query."""
        return self.bridge.queries

    @property
    def instruction(self) -> int:
        """Length of the instruction that the Q-Former reads with each image."""
        return min(LONGEST, self.bridge.positions)

    @property
    def tokens(self) -> Mapping[str, int]:
        """Tokens per image slot that the linear maps of each stage of the image side read."""
        queries, text = self.bridge.queries, self.instruction
        return {**super().tokens, "bridge": queries + text, "bridge/queries": queries, "bridge/text": text}


def from_hf(hf: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool) -> InstructBlipConfig:
    """Converts a Hugging Face config.

    Args:
        hf: the Hugging Face config including its defaults.
        raw: config.json as written.
        tied: whether the head shares the token table.

    Returns:
        Model config.

    Raises:
        AntgmmError: a language model other than T5 and Llama, a variant that is not supported, or an image token
            without a row in the token table.
    """
    qformer = hf["qformer_config"]
    language = language_of(hf, raw, tied=tied, kinds=("t5", "llama"))
    stack = qformer_of(qformer)
    return InstructBlipConfig(
        vision=vit_of(hf["vision_config"]),
        bridge=InstructQFormerConfig(
            stack=replace(stack, text_mlp=stack.mlp),
            queries=hf["num_query_tokens"],
            words=qformer["vocab_size"],
            positions=qformer["max_position_embeddings"],
        ),
        language=language,
        image_token=image_token_of(hf, language),
    )


def to_hf(config: InstructBlipConfig) -> dict[str, Any]:
    """Returns the fields of config.json that depend on the model's shape."""
    bridge = config.bridge
    return {
        "architectures": ["InstructBlipForConditionalGeneration"],
        "model_type": "instructblip",
        "image_token_index": config.image_token,
        "num_query_tokens": bridge.queries,
        "vision_config": {"model_type": "instructblip_vision_model", **vision_config(config.vision)},
        "qformer_config": {
            "model_type": "instructblip_qformer",
            "vocab_size": bridge.words,
            "max_position_embeddings": bridge.positions,
            **qformer_config(bridge.stack, config.vision.stack.embed),
        },
        **language_fields(config.language),
    }


def ties(config: InstructBlipConfig) -> tuple[Tie, ...]:
    """Returns the sizes that share one field of config.json."""
    return (*image_ties(config), Tie("bridge/text_mlp", "bridge/mlp"), *language_ties(config.language))


def violations(config: InstructBlipConfig) -> tuple[str, ...]:
    """Returns the reasons why transformers cannot load this shape; empty if it can."""
    return (*tie_violations(ties(config), config), *language_violations(config))
