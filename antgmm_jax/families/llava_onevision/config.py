"""Config of LLaVA-OneVision, its conversion from and to Hugging Face, and its legal shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from antgmm_jax.axes import part
from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.image_side import SIGLIP, image_fields, projector_of, vision_of
from antgmm_jax.families.common.text import TextConfig, text_config, text_of
from antgmm_jax.families.llava_onevision import tiles


@dataclass(frozen=True, kw_only=True)
class LlavaOnevisionConfig(LMMConfig):
    """SigLIP on tiles, a two-layer MLP with a newline vector, and a text model.

    `resolutions` are the heights and widths in pixels that an image alone in its row can be enlarged to. Its tokens are
    at most as many as those of `most_tiles` tiles, and those of the base tile.
    """

    family: str = "llava_onevision"
    bridge: ProjectorConfig = part("bridge", tokens="images")
    language: TextConfig
    resolutions: tuple[tuple[int, int], ...]
    most_tiles: int

    @property
    def patches_per_side(self) -> int:
        """Patches per side of a tile."""
        return self.vision.image // self.vision.patch

    @property
    def usual_place(self) -> Int[np.ndarray, "M P"]:
        """Describes the base tile of an image of the size of a tile, and the same tile once more with newlines."""
        size, side = (self.vision.image, self.vision.image), self.patches_per_side
        whole = tiles.group(size, (1, 1), side, self.most_tiles)
        return np.concatenate([tiles.base(size, side, 0), whole])

    @property
    def slots(self) -> int:
        """Image slots of an image of the usual size."""
        return len(self.usual_place)

    @property
    def usual_tokens(self) -> int:
        """Text positions that an image of the usual size occupies."""
        return tiles.tokens(self.usual_place)


def from_hf(hf: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool) -> LlavaOnevisionConfig:
    """Converts a Hugging Face config.

    The image encoder ends at the layer that the projector reads: later layers are never run and not part of the model.

    Args:
        hf: the Hugging Face config including its defaults.
        raw: config.json as written.
        tied: whether the head shares the token table.

    Returns:
        Model config.

    Raises:
        AntgmmError: the variant is not supported.
    """
    vision = vision_of(hf, types=(SIGLIP,))
    return LlavaOnevisionConfig(
        vision=vision,
        bridge=projector_of(hf),
        language=text_of(hf["text_config"], tied=tied),
        image_token=hf["image_token_index"],
        resolutions=_resolutions(hf["image_grid_pinpoints"], vision.image),
        most_tiles=_most_tiles(hf["vision_aspect_ratio"]),
    )


def _resolutions(pinpoints: list[Any], side: int) -> tuple[tuple[int, int], ...]:
    for point in pinpoints:
        if len(point) != 2 or any(length < side or length % side for length in point):
            raise AntgmmError(
                f"image_grid_pinpoints has {point}: heights and widths must be multiples of image_size = {side}"
            )
    return tuple((high, wide) for high, wide in pinpoints)


def _most_tiles(ratio: str) -> int:
    match = re.fullmatch(r"anyres_max_([1-9]\d*)", ratio)
    if match is None:
        raise AntgmmError(
            f"vision_aspect_ratio = {ratio!r} is not supported: it must be 'anyres_max_' and a number, as in"
            " 'anyres_max_9'"
        )
    return int(match[1])


def to_hf(config: LlavaOnevisionConfig) -> dict[str, Any]:
    """Returns the fields of config.json that depend on the model's shape."""
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_grid_pinpoints": [list(resolution) for resolution in config.resolutions],
        "image_token_index": config.image_token,
        "tie_word_embeddings": config.language.tied,
        "vision_aspect_ratio": f"anyres_max_{config.most_tiles}",
        "text_config": text_config(config.language),
        **image_fields(config.vision, config.bridge),
    }
