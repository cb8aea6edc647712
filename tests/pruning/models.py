"""Small models of two families with odd shapes and random parameters, and batches with padding."""

import dataclasses
from functools import lru_cache

import jax
import numpy as np

from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.config import LMMConfig, StackConfig, VisionConfig
from antgmm_jax.families.blip2.presets import sized as blip2_t5
from antgmm_jax.families.common.text import TextConfig
from antgmm_jax.families.llava.config import LlavaConfig
from antgmm_jax.pure import abstract
from tests.marks import long
from tests.reference import squares

IMAGE_TOKEN = 3


def _blip2_t5() -> LMMConfig:
    config = blip2_t5(
        vision=(3, 24, 3, 20),
        bridge=(4, 24, 3, 20),
        text=(3, 3, 20, 3, 12),
        head_dims=(8, 8, 8),
        image=16,
        patch=8,
        queries=3,
        vocab=32,
        image_token=IMAGE_TOKEN,
    )
    # A tied, scaled head uses the width in a formula.
    return dataclasses.replace(config, language=dataclasses.replace(config.language, tied=True, scaled_head=True))


def _llava() -> LMMConfig:
    vision = StackConfig(layers=3, embed=24, heads=3, head_dim=8, mlp=20, act="quick_gelu", eps=1e-5)
    plain = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), False)
    text = StackConfig(
        layers=3, embed=36, heads=3, q_per_kv=2, head_dim=8, mlp=20, act="silu", norm="rms", gated=True, causal=True,
        positions="rope", **plain,
    )  # fmt: skip
    return LlavaConfig(
        vision=VisionConfig(
            stack=vision, image=16, patch=8, patch_bias=False, first_norm=True, final_norm=False, keep_cls=False
        ),
        bridge=ProjectorConfig(mlp=36, act="gelu"),
        language=TextConfig(decoder=text, vocab=32, tied=False),
        image_token=IMAGE_TOKEN,
    )


CONFIGS = {"blip2_t5": _blip2_t5(), "llava": _llava()}
EACH = ["llava", long("blip2_t5")]
"""Names of both; `make test` leaves out the larger one."""


def randomised(config: LMMConfig, seed: int = 0):
    """Random normal parameters, norm scales around 1: initial zeros and ones would hide a wrong gather."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape).astype(np.float32)
        if str(path[-1]) == "['scale']":
            return (1 + 0.3 * value).astype(np.float32)
        return (value * (0.3 if leaf.ndim < 3 else 0.15)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract(config))


@lru_cache
def parameters(family: str):
    """The family's random parameters, numpy."""
    return randomised(CONFIGS[family])


def batch_of(config: LMMConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Two samples, the second with padding at the right of prompt and answer."""
    rng = np.random.default_rng(seed)
    images, length, answer = config.image_tokens, config.image_tokens + 4, 3
    ids = rng.integers(4, config.language.vocab, (2, length)).astype(np.int32)
    ids[:, :images] = IMAGE_TOKEN
    mask = np.ones((2, length), np.int32)
    mask[1, -2:] = 0
    pixels = rng.normal(size=(2, 3, config.vision.image, config.vision.image)).astype(np.float32)
    batch = {"images": squares(pixels), "input_ids": ids, "attention_mask": mask}
    if config.family == "llava":
        batch["labels"] = np.where(mask > 0, ids, -100)
        batch["positions"] = np.array([[length - 4, length - 3], [length - 4, length - 3]], np.int32)
        batch["targets"] = np.array([[5, 6], [7, -100]], np.int32)
        return batch
    labels = rng.integers(4, config.language.vocab, (2, answer)).astype(np.int32)
    labels[1, -1] = -100
    batch["labels"] = batch["targets"] = labels
    batch["decoder_input_ids"] = np.concatenate([np.zeros((2, 1), np.int32), np.abs(labels[:, :-1])], axis=1)
    batch["positions"] = np.tile(np.arange(answer, dtype=np.int32), (2, 1))
    return batch


def valid_logits(batch, logits) -> np.ndarray:
    """The logits at positions without padding, [tokens, V]."""
    mask = batch["labels"] >= 0 if "decoder_input_ids" in batch else batch["attention_mask"] > 0
    return np.asarray(logits)[mask]
