"""Variants of Gemma 3 that are refused."""

from collections.abc import Mapping
from typing import Any

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.rules import check_square

_KINDS = {"vision_config": "siglip_vision_model", "text_config": "gemma3_text"}
_LAYERS = ("full_attention", "sliding_attention")


def check(hf: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """Checks that a config.json describes a variant that is computed as transformers does.

    Args:
        hf: the Hugging Face config including its defaults.
        raw: config.json as written.

    Raises:
        AntgmmError: it does not.
    """
    vision, text = hf["vision_config"], hf["text_config"]
    for name, kind in _KINDS.items():
        # transformers takes any text model for its own.
        given = raw.get(name, {}).get("model_type", kind)
        if given != kind:
            raise AntgmmError(f"{name}.model_type = {given!r} is not supported: it must be {kind!r}")
    check_square(vision["image_size"], vision["patch_size"])
    _check_tokens(hf["mm_tokens_per_image"], vision["image_size"] // vision["patch_size"])
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if text[name] is not None:
            raise AntgmmError(f"{name} = {text[name]} is not supported: it must be null, as in Gemma 3")
    if text["use_bidirectional_attention"]:
        raise AntgmmError("use_bidirectional_attention is not supported: it must be false, as in Gemma 3")
    _check_layers(text)


def _check_tokens(tokens: int, patches: int) -> None:
    side = round(tokens**0.5)
    if side < 1 or side**2 != tokens or patches % side:
        raise AntgmmError(
            f"mm_tokens_per_image = {tokens} must be the square of a divisor of the {patches} patches per side:"
            " correct config.json"
        )


def _check_layers(text: Mapping[str, Any]) -> None:
    if unknown := sorted({*text["layer_types"]} - {*_LAYERS}):
        raise AntgmmError(f"layer_types has {unknown[0]!r}: use {' and '.join(_LAYERS)}")
    if not isinstance(text["sliding_window"], int) or text["sliding_window"] < 2:
        # The cache of transformers drops nothing if the window is 1.
        raise AntgmmError(f"sliding_window = {text['sliding_window']}: it must be at least 2")
    if text["query_pre_attn_scalar"] < 1:
        raise AntgmmError(f"query_pre_attn_scalar = {text['query_pre_attn_scalar']}: it must be at least 1")
    if text["num_attention_heads"] % text["num_key_value_heads"]:
        raise AntgmmError(
            f"num_attention_heads = {text['num_attention_heads']} must be a multiple of"
            f" num_key_value_heads = {text['num_key_value_heads']}"
        )
    for kind, known in zip(_LAYERS, (("default", "linear"), ("default",)), strict=True):
        scaling = text["rope_parameters"][kind]["rope_type"]
        if scaling not in known:
            raise AntgmmError(f"rope_type {scaling!r} of {kind} is not supported: it must be {' or '.join(known)}")
