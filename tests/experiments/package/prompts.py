"""Prompts for tests of packages."""

from pathlib import Path
from typing import Any

from antgmm_jax.io.convert import open_hf
from experiments.run.export.in_torch import split
from experiments.run.rows.random_batches import random_batch


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
