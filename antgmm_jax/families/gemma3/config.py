"""Config of Gemma 3, its conversion from and to Hugging Face, and its legal shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from antgmm_jax.axes import part
from antgmm_jax.config import LanguageConfig, LMMConfig, StackConfig, VisionConfig
from antgmm_jax.families.common.llama import head_violations, stack_of, text_fields
from antgmm_jax.families.common.vit import encoder_of, vision_config
from antgmm_jax.families.gemma3.checks import check
from antgmm_jax.families.rules import Tie, tie_violations


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Averages squares of image states to `side` x `side` ones, and maps these to the text width."""

    side: int


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(LMMConfig):
    """SigLIP, averages of squares with one linear map, and Gemma 3."""

    family: str = "gemma3"
    bridge: PoolConfig = part("bridge", tokens="images")

    @property
    def image_tokens(self) -> int:
        """Text positions that one image occupies."""
        return self.bridge.side**2


def from_hf(hf: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool) -> Gemma3Config:
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
    vision, text = hf["vision_config"], hf["text_config"]
    image = VisionConfig(
        stack=encoder_of(vision, vision["num_hidden_layers"]),
        image=vision["image_size"],
        patch=vision["patch_size"],
        channels=vision["num_channels"],
        has_cls=False,
    )
    return Gemma3Config(
        vision=image,
        bridge=PoolConfig(side=round(hf["mm_tokens_per_image"] ** 0.5)),
        language=LanguageConfig(decoder=_decoder(text), vocab=text["vocab_size"], tied=tied, scaled_tokens=True),
        image_token=hf["image_token_index"],
    )


def _decoder(text: Mapping[str, Any]) -> StackConfig:
    rope, local = (text["rope_parameters"][kind] for kind in ("full_attention", "sliding_attention"))
    plain = stack_of({**text, "hidden_act": text["hidden_activation"], "rope_parameters": rope})
    kinds = enumerate(text["layer_types"])
    return gemma(
        plain,
        scale_width=text["query_pre_attn_scalar"],
        rope_factor=float(rope.get("factor", 1.0)),
        local_theta=float(local["rope_theta"]),
        window=text["sliding_window"],
        local_layers=tuple(layer for layer, kind in kinds if kind == "sliding_attention"),
    )


def gemma(plain: StackConfig, **fields: Any) -> StackConfig:
    """Returns the config of a Gemma 3 decoder of the sizes of a Llama decoder."""
    return replace(plain, norm="rms1", sandwich=True, qk_norm=True, **fields)


def to_hf(config: Gemma3Config) -> dict[str, Any]:
    """Returns the fields of config.json that depend on the model's shape."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "image_token_index": config.image_token,
        "mm_tokens_per_image": config.image_tokens,
        "tie_word_embeddings": config.language.tied,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            **vision_config(config.vision),
        },
        "text_config": _text_config(config.language),
    }


def _text_config(language: LanguageConfig) -> dict[str, Any]:
    text, fields = language.decoder, text_fields(language)
    scaling = {"rope_type": "default"} if text.rope_factor == 1 else {"rope_type": "linear", "factor": text.rope_factor}
    activation = fields.pop("hidden_act")  # the name of others
    return {
        **fields,
        "model_type": "gemma3_text",
        "hidden_activation": activation,
        "query_pre_attn_scalar": text.scale_width,
        "sliding_window": text.window,
        "layer_types": ["sliding_attention" if local else "full_attention" for local in text.is_local],
        "rope_parameters": {
            "full_attention": {"rope_theta": text.rope_theta, **scaling},
            "sliding_attention": {"rope_theta": text.local_theta, "rope_type": "default"},
        },
    }


def ties(config: Gemma3Config) -> tuple[Tie, ...]:
    """Returns the sizes that share one field of config.json."""
    return (Tie("vision/embed", "vision/heads", config.vision.stack.head_dim),)


def violations(config: Gemma3Config) -> tuple[str, ...]:
    """Returns the reasons why transformers cannot load this shape; empty if it can."""
    return (*tie_violations(ties(config), config), *head_violations(config.language.decoder))
