"""Checks of Qwen3-VL configs for variants that are not supported."""

from collections.abc import Mapping
from typing import Any

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common import qwen


def check(vision: Mapping[str, Any], text: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """Refuses inconsistent configs and variants that are not supported.

    Args:
        vision: `vision_config` including its defaults.
        text: `text_config` including its defaults.
        raw: config.json as written.

    Raises:
        AntgmmError: names the field, its value and what would work.
    """
    # transformers reads no other order of `mrope_section` than the interleaved one, whatever the field says.
    qwen.check(vision, text, raw, text["head_dim"])
    _check_deepstack(vision, text)
    entries = vision["num_position_embeddings"]
    if round(entries**0.5) ** 2 != entries:
        raise AntgmmError(f"vision_config.num_position_embeddings = {entries} must be a square number")


def _check_deepstack(vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """transformers accepts stale indexes silently: it never reaches them, or runs another merger."""
    taps, layers = [*vision["deepstack_visual_indexes"]], text["num_hidden_layers"]
    qwen.check_layers("deepstack_visual_indexes", taps, vision["depth"])
    if len(taps) > layers:
        raise AntgmmError(
            f"vision_config.deepstack_visual_indexes = {taps} needs as many text layers, but num_hidden_layers ="
            f" {layers}: remove indexes"
        )
