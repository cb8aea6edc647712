"""The image side that LLaVA and its successors share: CLIP or SigLIP up to one feature layer, and a two-layer MLP."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.config import LMMConfig, VisionConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.base import Files
from antgmm_jax.families.common.table import Entry, dense
from antgmm_jax.families.common.text import TextConfig, text_ties, text_violations
from antgmm_jax.families.common.vit import encoder_of, vision_config, vision_weights
from antgmm_jax.families.rules import Tie, check_square, tie_violations

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"

RENAMES = (
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
"""Tensor names differ between transformers 5.x and older releases; ours are the older ones, which vLLM needs."""
INNER = (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.")
"""Further names of the encoder's tensors in 5.x."""
_VISION = "vision_tower.vision_model"
TEXT = "language_model.model"
"""Prefix of the text model's tensors."""
HEAD = "language_model.lm_head.weight"
"""Tensor of the head."""
_UNREAD = re.compile(r"vision_tower\.vision_model\.(?:encoder\.layers\.(\d+)|head)\.")


def _unread(config: LMMConfig, name: str) -> bool:
    """Whether a tensor is stored but never run: of a layer after the feature layer, or of SigLIP's own head."""
    match = _UNREAD.match(name)
    return match is not None and (match[1] is None or int(match[1]) >= config.vision.stack.layers)


FILES = Files(
    head=HEAD,
    tokens=(f"{TEXT}.embed_tokens.weight",),
    renames=(*RENAMES, INNER),
    ignored=(r".*position_ids", r".*rotary_emb\.inv_freq"),
    unread=_unread,
)


def used_layers(feature_layer: Any, layers: int) -> int:
    """Returns the number of layers up to the one that the projector reads; later ones are never run.

    Args:
        feature_layer: `vision_feature_layer` of a config.json, a number or a list of one; 0 is the input of the first
            layer, -1 the last output.
        layers: layers of the image encoder.

    Raises:
        AntgmmError: several layers, or one that does not exist.
    """
    if isinstance(feature_layer, list) and len(feature_layer) == 1:
        (feature_layer,) = feature_layer
    if not isinstance(feature_layer, int):
        raise AntgmmError(f"vision_feature_layer = {feature_layer} is not supported: it must be a single layer")
    used = layers + 1 + feature_layer if feature_layer < 0 else feature_layer
    if not 1 <= used <= layers:
        raise AntgmmError(
            f"vision_feature_layer = {feature_layer} does not exist: the image encoder has {layers} layers"
        )
    return used


def vision_of(hf: Mapping[str, Any], *, types: Sequence[str] = (CLIP, SIGLIP)) -> VisionConfig:
    """Converts the image encoder of a config.json, up to the layer that the projector reads.

    Args:
        hf: the Hugging Face config including its defaults.
        types: supported values of its `vision_config.model_type`.

    Returns:
        Config of the image encoder.

    Raises:
        AntgmmError: another type of encoder, several feature layers, or tokens that SigLIP does not have.
    """
    vision, strategy = hf["vision_config"], hf["vision_feature_select_strategy"]
    clip = vision["model_type"] == CLIP
    if vision["model_type"] not in types:
        raise AntgmmError(
            f"vision_config.model_type = {vision['model_type']!r} is not supported: it must be {' or '.join(types)}"
        )
    if not clip and strategy != "full":
        raise AntgmmError(
            f"vision_feature_select_strategy = {strategy!r} drops the first patch, as SigLIP has no class token:"
            " it must be 'full'"
        )
    used = used_layers(hf["vision_feature_layer"], vision["num_hidden_layers"])
    check_square(vision["image_size"], vision["patch_size"])
    return VisionConfig(
        stack=encoder_of(vision, used),
        image=vision["image_size"],
        patch=vision["patch_size"],
        channels=vision["num_channels"],
        patch_bias=not clip,
        first_norm=clip,
        final_norm=False,
        has_cls=clip,
        keep_cls=strategy == "full",
    )


def projector_of(hf: Mapping[str, Any]) -> ProjectorConfig:
    """Converts the projector of a config.json including its defaults."""
    return ProjectorConfig(
        mlp=hf["text_config"]["hidden_size"], act=hf["projector_hidden_act"], bias=hf["multimodal_projector_bias"]
    )


def image_fields(vision: VisionConfig, bridge: ProjectorConfig) -> dict[str, Any]:
    """Returns the fields of config.json about the image side that depend on the model's shape."""
    kind = {"model_type": CLIP} if vision.has_cls else {"model_type": SIGLIP, "vision_use_head": False}
    return {
        "multimodal_projector_bias": bridge.bias,
        "projector_hidden_act": bridge.act,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full" if vision.keep_cls else "default",
        "vision_config": {**kind, **vision_config(vision)},
    }


def image_weights(vision: VisionConfig, bridge: ProjectorConfig) -> list[Entry]:
    """Returns the conversion table of image encoder and projector."""
    up_bias, down_bias = ("bridge/up_bias", "bridge/down_bias") if bridge.bias else (None, None)
    return [
        *vision_weights(vision, _VISION),
        *dense("multi_modal_projector.linear_1", "bridge/up", up_bias, "m e -> e m"),
        *dense("multi_modal_projector.linear_2", "bridge/down", down_bias, "e m -> m e"),
    ]


def ties(config: LMMConfig) -> tuple[Tie, ...]:
    """Returns the sizes of a model with this image side that share one field of config.json."""
    assert isinstance(config.language, TextConfig)
    vision = Tie("vision/embed", "vision/heads", config.vision.stack.head_dim)
    return (vision, Tie("bridge/mlp", "text/embed"), *text_ties(config.language))


def violations(config: LMMConfig) -> tuple[str, ...]:
    """Returns the reasons why transformers or vLLM cannot load a model of this shape; empty if they can."""
    return (*tie_violations(ties(config), config), *text_violations(config))
