"""Config of Qwen2.5-VL, its conversion from and to Hugging Face, and its legal shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from antgmm_jax.blocks.packed import PackedConfig, PackedVisionConfig
from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.config import LanguageConfig, StackConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.llama import stack_of, text_fields
from antgmm_jax.families.common.qwen import check, check_layers, encoder_of, vision_fields
from antgmm_jax.families.rules import Tie, tie_violations

WINDOWS = 4
"""Windows per side of the image of the usual size: no field of config.json says what is usual."""
_EPS = 1e-6  # of the image encoder's norms: not a field of config.json


@dataclass(frozen=True, kw_only=True)
class Qwen25VLConfig(PackedConfig):
    """A packed vision transformer with windows, a merger of 2 x 2 patches and Qwen2.

    `flat`: the fields of the text model are at the top of config.json, as in the releases on the Hub.
    """

    family: str = "qwen2_5_vl"
    flat: bool = False


def from_hf(hf: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool) -> Qwen25VLConfig:
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
    _check_text(text)
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    check(vision, text, raw, head_dim)
    window = _window(vision)
    full = vision["fullatt_block_indexes"]
    check_layers("fullatt_block_indexes", full, vision["depth"])
    local = tuple(layer for layer in range(vision["depth"]) if layer not in full)
    decoder = replace(
        stack_of({**text, "head_dim": head_dim, "attention_bias": True}),
        out_bias=False,
        rope_sections=tuple(text["rope_parameters"]["mrope_section"]),
        rope_interleaved=False,
    )
    image = PackedVisionConfig(
        stack=windowed(encoder_of(vision), local),
        image=WINDOWS * window * vision["spatial_merge_size"] * vision["patch_size"],
        patch=vision["patch_size"],
        channels=vision["in_channels"],
        patch_bias=False,
        merge=vision["spatial_merge_size"],
        frames=vision["temporal_patch_size"],
        window=window,
    )
    return Qwen25VLConfig(
        vision=image,
        bridge=ProjectorConfig(mlp=image.merge**2 * vision["hidden_size"], act="gelu"),
        language=LanguageConfig(decoder=decoder, vocab=text["vocab_size"], tied=tied),
        image_token=hf["image_token_id"],
        flat="text_config" not in raw,
    )


def windowed(stack: StackConfig, local: tuple[int, ...]) -> StackConfig:
    """Returns an image encoder's stack with gated MLPs, RMSNorm and these local layers."""
    return replace(stack, norm="rms", eps=_EPS, gated=True, local_layers=local)


def _check_text(text: Mapping[str, Any]) -> None:
    if "sliding_attention" in text["layer_types"]:
        raise AntgmmError("use_sliding_window = true is not supported: text layers must have full attention")
    if text["hidden_size"] % text["num_attention_heads"]:
        raise AntgmmError(
            f"hidden_size = {text['hidden_size']} must be a multiple of num_attention_heads ="
            f" {text['num_attention_heads']}"
        )


def _window(vision: Mapping[str, Any]) -> int:
    """Squares per side of a window."""
    side, square = vision["window_size"], vision["spatial_merge_size"] * vision["patch_size"]
    if side < square:
        raise AntgmmError(
            f"vision_config.window_size = {side} must be at least spatial_merge_size x patch_size = {square}"
        )
    return side // square


def to_hf(config: Qwen25VLConfig) -> dict[str, Any]:
    """Returns the fields of config.json that depend on the model's shape."""
    vision, text = config.vision, config.language.decoder
    # transformers computes the head width, and vLLM reads no other.
    fixed = ("head_dim", "attention_bias")
    words = {name: value for name, value in text_fields(config.language).items() if name not in fixed}
    words |= {
        "layer_types": ["full_attention"] * text.layers,
        "max_window_layers": text.layers,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": text.rope_theta,
            "mrope_section": list(text.rope_sections),
        },
    }
    return {
        **(words if config.flat else {"text_config": {**words, "model_type": "qwen2_5_vl_text"}}),
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": config.image_token,
        "tie_word_embeddings": config.language.tied,
        "vision_config": {
            "model_type": "qwen2_5_vl_vision",
            **vision_fields(vision, text),
            "window_size": vision.window * vision.merge * vision.patch,
            "fullatt_block_indexes": [layer for layer, local in enumerate(vision.stack.is_local) if not local],
        },
    }


def ties(config: Qwen25VLConfig) -> tuple[Tie, ...]:
    """Returns the sizes that share one field of config.json."""
    text = config.language.decoder
    return (
        Tie("vision/embed", "vision/heads", config.vision.stack.head_dim),
        Tie("bridge/mlp", "vision/embed", config.vision.merge**2),
        Tie("text/embed", "text/heads", text.q_per_kv * text.head_dim),
    )


def violations(config: Qwen25VLConfig) -> tuple[str, ...]:
    """Returns the reasons why transformers cannot load this shape; empty if it can."""
    return tie_violations(ties(config), config)
