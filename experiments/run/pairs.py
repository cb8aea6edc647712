"""More to learn from the same samples: each picture with other samples' questions, answered by the teacher."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import ProcessorMixin

from antgmm_jax.axes import to_dict
from antgmm_jax.config import LMMConfig
from antgmm_jax.functional import Params
from antgmm_jax.processes import by_first
from data.processor import Prepared
from distill import fingerprint
from experiments.run.datasets import encoded
from experiments.run.evaluate import evaluate
from experiments.run.folder import held, write_json
from experiments.run.host.console import bar
from experiments.run.samples import Samples
from experiments.run.schema import Recipe

BATCH = 128


def with_pairs(
    recipe: Recipe, samples: Samples, config: LMMConfig, params: Params, processor: ProcessorMixin, folder: Path
) -> Samples:
    """The samples of a recipe, and those that its `teacher.pairs` asks for.

    Args:
        recipe: the recipe.
        samples: its samples.
        config: the teacher.
        params: its parameters.
        processor: its processor.
        folder: where its answers are kept, `KEY.answers.json`.

    Returns:
        Both together.
    """
    pairs = encoded(recipe, paired(samples.records, recipe.teacher.pairs), processor, config)
    longest = recipe.evaluate.max_new_tokens
    key = fingerprint(params, f"{json.dumps(to_dict(config))} {longest} {pairs.fingerprint}")

    def ask() -> list[str]:
        with bar("answers to pairs", len(pairs)) as update:
            return evaluate(
                config, params, pairs, processor, max_new_tokens=longest, batch_size=BATCH, progress=update
            )[1]

    place = folder / key[:16]
    with held(place):
        found = answered(pairs.records, ask, place.with_suffix(".answers.json"), key)
    return encoded(recipe, joined(samples.records, found), processor, config, trained=True)


def paired(records: Prepared, count: int) -> Prepared:
    """Records that each take question and text from one sample and the picture from another.

    Every sample gives its question, and its picture, once before any gives it again. The draw is always the same: what
    it makes is a part of the data.

    Args:
        records: at least two samples.
        count: how many records to make.

    Returns:
        The records; their answers are still those to the question's own picture.
    """
    rng = np.random.default_rng(0)
    turns = [rng.permutation(len(records)) for _ in range(-(-count // len(records)))]
    asks = np.concatenate(turns)[:count]
    shows = np.concatenate([np.roll(turn, 1) for turn in turns])[:count]
    made = [
        replace(records[ask], image=records.images[show], id=f"{records[ask].id} on {records[show].id}")
        for ask, show in zip(asks, shows, strict=True)
    ]
    return Prepared(made, records.images[shows])


def answered(records: Prepared, answers: Callable[[], list[str]], file: Path, key: str) -> Prepared:
    """Records with a model's answers, which are kept in a file; those that it answers with nothing are left out.

    Args:
        records: the records.
        answers: asks the model, record by record.
        file: JSON, written once.
        key: of the model and the records; answers under another key are asked for anew.

    Returns:
        The records.
    """

    def kept() -> list[str] | None:
        found = json.loads(file.read_text()) if file.exists() else {}
        return found["answers"] if found.get("key") == key else None

    said = kept()
    if said is None:
        said = answers()
        by_first(lambda: write_json(file, {"key": key, "answers": said}))
    rows = [row for row, answer in enumerate(said) if answer]
    return Prepared([replace(records[row], answer=said[row]) for row in rows], records.images[rows])


def joined(first: Prepared, second: Prepared) -> Prepared:
    """Records of both."""
    return Prepared([*first, *second], np.concatenate([first.images, second.images]))
