"""Checks of Mistral 3 configs for variants that are not supported."""

from collections.abc import Mapping
from typing import Any

from antgmm_jax.errors import AntgmmError

_ROPE = {"mistral": "default", "ministral3": "yarn"}
"""Type of the text model -> its rotary positions."""


def check(hf: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """Refuses inconsistent configs and variants that are not supported.

    Args:
        hf: the Hugging Face config including its defaults.
        raw: config.json as written.

    Raises:
        AntgmmError: names the field, its value and what would work.
    """
    if hf["vision_feature_layer"] not in (-1, [-1]):
        raise AntgmmError(f"vision_feature_layer = {hf['vision_feature_layer']} is not supported: it must be -1")
    _check_vision(hf["vision_config"], hf["spatial_merge_size"])
    _check_text(hf["text_config"])


def _check_vision(vision: Mapping[str, Any], merge: int) -> None:
    if vision["model_type"] != "pixtral":
        raise AntgmmError(f"vision_config.model_type = {vision['model_type']!r} is not supported: it must be 'pixtral'")
    for name in ("image_size", "patch_size"):
        if not isinstance(vision[name], int):
            raise AntgmmError(f"vision_config.{name} = {vision[name]}: it must be one number")
    if vision["image_size"] < (square := merge * vision["patch_size"]):
        raise AntgmmError(
            f"vision_config.image_size = {vision['image_size']} must be at least spatial_merge_size x patch_size ="
            f" {square}"
        )
    head = vision["hidden_size"] // vision["num_attention_heads"]
    if vision["hidden_size"] % vision["num_attention_heads"] or head % 4:
        raise AntgmmError(
            f"vision_config.hidden_size = {vision['hidden_size']} must be num_attention_heads ="
            f" {vision['num_attention_heads']} times a multiple of 4"
        )


def _check_text(text: Mapping[str, Any]) -> None:
    if text["model_type"] not in _ROPE:
        raise AntgmmError(
            f"text_config.model_type = {text['model_type']!r} is not supported: use {' or '.join(map(repr, _ROPE))}"
        )
    if text["sliding_window"] is not None:
        raise AntgmmError(f"text_config.sliding_window = {text['sliding_window']} is not supported: it must be null")
    rope = text["rope_parameters"]
    if rope["rope_type"] != (wanted := _ROPE[text["model_type"]]):
        raise AntgmmError(
            f"rope_type {rope['rope_type']!r} of {text['model_type']} is not supported: it must be {wanted!r}"
        )
    if wanted == "yarn":
        _check_yarn(rope)


def _check_yarn(rope: Mapping[str, Any]) -> None:
    for name in ("factor", "llama_4_scaling_beta", "original_max_position_embeddings"):
        if rope.get(name) is None:
            raise AntgmmError(f"rope_parameters.{name} is missing: set it to the value that the model was trained with")
    # Then cosines and sines are not scaled.
    if rope.get("attention_factor") or not rope.get("mscale") or rope["mscale"] != rope.get("mscale_all_dim"):
        factors = {name: rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim")}
        raise AntgmmError(
            f"rope_parameters with {factors} is not supported: mscale and mscale_all_dim must be equal and"
            " attention_factor absent"
        )
    if rope.get("truncate", True) is not True:
        raise AntgmmError(f"rope_parameters.truncate = {rope['truncate']} is not supported: it must be true")
