"""Config of InternVL, its conversion from and to Hugging Face, and its legal shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from antgmm_jax.axes import axis, part
from antgmm_jax.config import Act, LMMConfig, StackConfig, VisionConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.image_side import used_layers
from antgmm_jax.families.common.text import TextConfig, text_config, text_of
from antgmm_jax.families.rules import check_square

_NORMS: dict[str, Literal["layer", "rms"]] = {"layer_norm": "layer", "rms_norm": "rms"}


@dataclass(frozen=True, kw_only=True)
class ShuffleMergerConfig:
    """A LayerNorm and a two-layer MLP over squares of `scale` x `scale` patches."""

    mlp: int = axis()
    act: Act
    scale: int


@dataclass(frozen=True, kw_only=True)
class InternVLConfig(LMMConfig):
    """InternViT, pixel shuffle with a two-layer MLP, and a text model; each tile of an image fills a slot."""

    family: str = "internvl"
    bridge: ShuffleMergerConfig = part("bridge", tokens="images")
    language: TextConfig

    @property
    def image_tokens(self) -> int:
        """Text positions that one tile occupies."""
        return self.vision.patches // self.bridge.scale**2


def from_hf(hf: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool) -> InternVLConfig:
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
    _check_encoder(hf["vision_config"], hf["vision_feature_select_strategy"])
    vision = _vision(hf["vision_config"], hf["vision_feature_layer"])
    ratio, side = hf["downsample_ratio"], vision.image // vision.patch
    scale = round(1 / ratio)
    if scale * ratio != 1 or side % scale:
        raise AntgmmError(f"downsample_ratio = {ratio} must be 1 / n for an n that divides the {side} patches per side")
    text = hf["text_config"]
    return InternVLConfig(
        vision=vision,
        bridge=ShuffleMergerConfig(mlp=text["hidden_size"], act=hf["projector_hidden_act"], scale=scale),
        language=text_of(text, tied=tied),
        image_token=hf["image_token_id"],
    )


def _check_encoder(vision: Mapping[str, Any], strategy: str) -> None:
    """Refuses variants of the image encoder that are not supported."""
    needed = {
        "model_type": "internvl_vision",
        "use_qk_norm": False,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": True,
    }
    for name, value in needed.items():
        if vision[name] != value:
            raise AntgmmError(f"vision_config.{name} = {vision[name]!r} is not supported: it must be {value!r}")
    if vision["norm_type"] not in _NORMS:
        raise AntgmmError(f"vision_config.norm_type = {vision['norm_type']!r} must be {' or '.join(_NORMS)}")
    if strategy != "default":
        raise AntgmmError(f"vision_feature_select_strategy = {strategy!r} is not supported: it must be 'default'")


def _vision(vision: Mapping[str, Any], feature_layer: Any) -> VisionConfig:
    image, patch = (_side(vision[name]) for name in ("image_size", "patch_size"))
    check_square(image, patch)
    return VisionConfig(
        stack=StackConfig(
            layers=used_layers(feature_layer, vision["num_hidden_layers"]),
            embed=vision["hidden_size"],
            heads=vision["num_attention_heads"],
            head_dim=vision["hidden_size"] // vision["num_attention_heads"],
            mlp=vision["intermediate_size"],
            act=vision["hidden_act"],
            norm=_NORMS[vision["norm_type"]],
            eps=vision["layer_norm_eps"],
            qkv_bias=vision["attention_bias"],
            layer_scale=True,
        ),
        image=image,
        patch=patch,
        channels=vision["num_channels"],
        final_norm=False,
        has_final_norm=False,
        keep_cls=False,
    )


def _side(size: Any) -> Any:
    """The side of a square that is given as one number or as height and width."""
    return size if isinstance(size, int) or len({*size}) > 1 else size[0]


def to_hf(config: InternVLConfig) -> dict[str, Any]:
    """Returns the fields of config.json that depend on the model's shape."""
    vision, stack = config.vision, config.vision.stack
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": 1 / config.bridge.scale,
        "image_seq_length": config.image_tokens,
        "image_token_id": config.image_token,
        "projector_hidden_act": config.bridge.act,
        "tie_word_embeddings": config.language.tied,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": stack.embed,
            "intermediate_size": stack.mlp,
            "num_hidden_layers": stack.layers,
            "num_attention_heads": stack.heads,
            "num_channels": vision.channels,
            "image_size": [vision.image, vision.image],
            "patch_size": [vision.patch, vision.patch],
            "hidden_act": stack.act,
            "layer_norm_eps": stack.eps,
            "norm_type": "rms_norm" if stack.norm == "rms" else "layer_norm",
            "attention_bias": stack.qkv_bias,
            "use_mask_token": False,
            "use_mean_pooling": True,
        },
        "text_config": text_config(config.language),
    }
