"""Random batches for benchmarks and for the export gate without data."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError


def random_batch(config: LMMConfig, rows: int, *, words: int = 16, answer: int = 8, seed: int = 0) -> dict[str, Any]:
    """Creates a training batch of random images of the usual size and tokens, with the prompts alone under `prompt/`.

    Args:
        config: model config.
        rows: number of samples.
        words: prompt tokens, without image tokens.
        answer: answer tokens.
        seed: random seed.

    Returns:
        Model inputs with the names of `transformers`, `images`, `positions`, `targets`, and row numbers `index`.
    """
    rng = np.random.default_rng(seed)
    language = config.language

    def tokens(length: int) -> np.ndarray:
        ids = rng.integers(2, language.vocab - 1, (rows, length), dtype=np.int32)
        # The image token must only occur at the image.
        return np.where(ids == config.image_token, ids - 1, ids)

    image = np.full((rows, config.usual_tokens), config.image_token, np.int32)
    prompt, targets = np.concatenate([image, tokens(words)], axis=1), tokens(answer)
    usual = usual_image(config)
    images = {name: np.stack([leaf] * rows) for name, leaf in usual.items() if name not in ("scale", "offset")}
    images["pixels"] = rng.standard_normal((rows, *usual["pixels"].shape), dtype=np.float32)
    batch = {
        "images": images,
        "targets": targets,
        "prompt/input_ids": prompt,
        "prompt/attention_mask": np.ones_like(prompt),
        "index": np.arange(rows, dtype=np.int32),
    }
    prompts = {name: batch[f"prompt/{name}"] for name in ("input_ids", "attention_mask")}
    return batch | teacher_forced(config, prompts, targets)


def usual_length(config: LMMConfig, length: int = 0) -> int:
    """Returns the prompt tokens of a request with one image of the usual size.

    Args:
        config: model config.
        length: wanted prompt tokens, including image tokens; 0 for 64, or 32 more than the image has.

    Raises:
        AntgmmError: the image alone takes as many tokens.
    """
    least = config.usual_tokens + 32
    if 0 < length <= config.usual_tokens:
        raise AntgmmError(
            f"a prompt of {length} tokens is too short for {config.usual_tokens} image tokens: use --length {least}"
        )
    return length or max(64, least)


def usual_image(config: LMMConfig) -> dict[str, np.ndarray]:
    """Returns a black image of the usual size as a tree with leaves [M, ...], uint8 pixels.

    Args:
        config: model config.
    """
    slots, side, channels = config.slots, config.side, config.vision.channels
    more = {} if config.usual_place is None else {"place": config.usual_place}
    if config.instruction:
        more["instruction"] = np.zeros((slots, config.instruction), np.int32)
    return {
        "pixels": np.zeros((slots, side, side, channels), np.uint8),
        "scale": np.ones((slots, channels), np.float32),
        "offset": np.zeros((slots, channels), np.float32),
        "valid": np.ones(slots, bool),
        **more,
    }


def teacher_forced(config: LMMConfig, prompt: Mapping[str, np.ndarray], targets: np.ndarray) -> dict[str, np.ndarray]:
    """Builds model inputs for teacher forcing, from prompts without padding.

    Args:
        config: model config.
        prompt: `input_ids` and `attention_mask`, [B, T].
        targets: answer tokens, [B, A].

    Returns:
        Tokens and mask with the names of `transformers`, and `positions` [B, A] of the logits that predict the targets.
    """
    language, (rows, answer) = config.language, targets.shape
    if config.encoder_decoder:
        start = np.full((rows, 1), language.start_token, np.int32)
        batch = {
            "input_ids": prompt["input_ids"],
            "decoder_input_ids": np.concatenate([start, targets[:, :-1]], axis=1),
        }
        first = 0
    else:
        batch = {"input_ids": np.concatenate([prompt["input_ids"], targets], axis=1)}
        first = prompt["input_ids"].shape[1] - 1
    batch["attention_mask"] = np.ones_like(batch["input_ids"])
    batch["positions"] = np.tile(np.arange(first, first + answer, dtype=np.int32), (rows, 1))
    return batch
