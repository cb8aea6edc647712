"""Prompts for tests of packages."""

from pathlib import Path
from typing import Any

import numpy as np

from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.loading import load_processor
from data.record import Record
from experiments.package.build import longest
from experiments.package.requests import Shape
from experiments.run.export.in_torch import split
from experiments.run.rows.random_batches import random_batch
from experiments.run.rows.samples import Samples

QUESTION = "what price is pictured?"


def prompts(directory: Path, tokens: int) -> dict[str, Any]:
    """A batch of three prompts of which the first is two tokens shorter, with answers of some tokens."""
    config, _ = open_hf(directory)
    batch = random_batch(config, 3, answer=tokens)
    prompt = split(batch)[1]
    ids, mask = prompt["input_ids"].copy(), prompt["attention_mask"].copy()
    if config.encoder_decoder:
        ids[0, -2:], mask[0, -2:] = 0, 0
    else:
        ids[0, 2:], ids[0, :2], mask[0, :2] = ids[0, :-2].copy(), 0, 0
    return batch | {"prompt/input_ids": ids, "prompt/attention_mask": mask}


def tiled(directory: Path, tokens: int) -> dict[str, Any]:
    """A batch of three prompts with pictures of different shapes, as the processor splits them, and short answers."""
    del tokens
    rng, sizes = np.random.default_rng(0), ((24, 64), (40, 40), (64, 24))
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    records = [Record(images=(picture,), question=QUESTION, answer="yes") for picture in pictures]
    (batch,) = Samples(records, load_processor(directory), open_hf(directory)[0]).in_order(3, prompts=True)
    return dict(batch)


def shapes(batch: dict[str, Any]) -> list[Shape]:
    """Shapes for two rows and for one, wider than the prompts."""
    width = longest([batch])
    return [Shape(2, width + 4), Shape(1, width + 12)]
