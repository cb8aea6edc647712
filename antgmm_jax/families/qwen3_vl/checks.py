"""Checks of Qwen3-VL configs for variants that are not supported."""

from collections.abc import Mapping
from typing import Any

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.rules import check_unquantized


def check(vision: Mapping[str, Any], text: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """Refuses inconsistent configs and variants that are not supported.

    Args:
        vision: `vision_config` including its defaults.
        text: `text_config` including its defaults.
        raw: config.json as written.

    Raises:
        AntgmmError: names the field, its value and what would work.
    """
    if text["model_type"] != "qwen3_vl_text":
        raise AntgmmError(
            f"text_config.model_type = {text['model_type']!r} is not supported: it must be 'qwen3_vl_text'"
        )
    check_unquantized(raw)
    _check_deepstack(vision, text)
    _check_rope(vision, text)
    for name in ("patch_size", "temporal_patch_size"):
        if not isinstance(vision[name], int):
            raise AntgmmError(f"vision_config.{name} = {vision[name]}: it must be one number")
    entries = vision["num_position_embeddings"]
    if round(entries**0.5) ** 2 != entries:
        raise AntgmmError(f"vision_config.num_position_embeddings = {entries} must be a square number")
    if vision["out_hidden_size"] != text["hidden_size"]:
        raise AntgmmError(
            f"vision_config.out_hidden_size = {vision['out_hidden_size']} must be text_config.hidden_size ="
            f" {text['hidden_size']}"
        )


def _check_deepstack(vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """transformers accepts stale indexes silently: it never reaches them, or runs another merger."""
    taps, depth, layers = [*vision["deepstack_visual_indexes"]], vision["depth"], text["num_hidden_layers"]
    if taps != sorted(set(taps)) or not all(0 <= tap < depth for tap in taps):
        raise AntgmmError(
            f"vision_config.deepstack_visual_indexes = {taps} must ascend within 0..{depth - 1}, as depth = {depth}"
        )
    if len(taps) > layers:
        raise AntgmmError(
            f"vision_config.deepstack_visual_indexes = {taps} needs as many text layers, but num_hidden_layers ="
            f" {layers}: remove indexes"
        )


def _check_rope(vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    rope, width = text["rope_parameters"], text["head_dim"]
    if rope.get("rope_type", "default") != "default":
        raise AntgmmError(f"rope_type {rope['rope_type']!r} is not supported: it must be 'default'")
    # transformers reads no other order than the interleaved one, whatever the field says.
    sections = rope.get("mrope_section")
    if sections is None or len(sections) != 3 or sum(sections) != width // 2:
        raise AntgmmError(
            f"rope_parameters.mrope_section = {sections} must be three numbers that sum to head_dim / 2 = {width // 2}"
        )
    head = vision["hidden_size"] // vision["num_heads"]
    if vision["hidden_size"] % vision["num_heads"] or head % 4:
        raise AntgmmError(
            f"vision_config.hidden_size = {vision['hidden_size']} must be num_heads = {vision['num_heads']} times a"
            " multiple of 4"
        )
