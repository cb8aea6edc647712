"""More to learn from the same samples: each picture with other samples' questions, answered by the teacher."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import ProcessorMixin

from antgmm_jax.axes import to_dict
from antgmm_jax.config import LMMConfig
from antgmm_jax.parallel.processes import by_first
from antgmm_jax.pure import Params
from data.record import Record
from data.rows import Row
from data.source import Source
from distill import fingerprint
from experiments.run.datasets import encoded
from experiments.run.evaluation import evaluate
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
    return encoded(recipe, Joined(samples.records, found), processor, config, trained=True)


class Paired(Source):
    """Records that each take question and text from one sample and the pictures from another.

    Args:
        source: the samples.
        asks: which sample asks, of each record.
        shows: which one shows.
    """

    def __init__(self, source: Source, asks: np.ndarray, shows: np.ndarray):
        self._source, self._asks, self._shows, self.drawn = source, asks, shows, source.drawn

    def __len__(self) -> int:
        return len(self._asks)

    def words(self, index: int) -> Row:
        """A record without its pictures; its answer is still that to the question's own."""
        asks, shows = (self._source.words(int(each[index])) for each in (self._asks, self._shows))
        return replace(asks, id=f"{asks.id} on {shows.id}", images=())

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        images = self._source[int(self._shows[index])].images
        return Record(**{**vars(self.words(index)), "images": images})

    def digest(self) -> str:
        """A digest of the samples and of which ask and show."""
        return _digest(self._source.digest(), self._asks.tobytes(), self._shows.tobytes())


class Answered(Source):
    """Some records of a source with other answers.

    Args:
        source: the records.
        rows: which of them.
        answers: theirs.
    """

    def __init__(self, source: Source, rows: Sequence[int], answers: Sequence[str]):
        self._source, self._rows, self._answers, self.drawn = source, rows, answers, source.drawn

    def __len__(self) -> int:
        return len(self._rows)

    def words(self, index: int) -> Row:
        """A record without its pictures."""
        return replace(self._source.words(self._rows[index]), answer=self._answers[index])

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        return replace(self._source[self._rows[index]], answer=self._answers[index])

    def digest(self) -> str:
        """A digest of the records and their answers."""
        return _digest(self._source.digest(), repr((self._rows, self._answers)).encode())


class Joined(Source):
    """Records of two sources, one after the other."""

    def __init__(self, first: Source, second: Source):
        self._parts, self.drawn = (first, second), first.drawn or second.drawn

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def _part(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{len(self)} records, no record {index}")
        first = len(self._parts[0])
        return (self._parts[0], index) if index < first else (self._parts[1], index - first)

    def words(self, index: int) -> Row:
        """A record without its pictures."""
        source, place = self._part(index)
        return source.words(place)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        source, place = self._part(index)
        return source[place]

    def digest(self) -> str:
        """A digest of both."""
        return _digest(*(part.digest() for part in self._parts))


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
    return digest.hexdigest()


def paired(records: Source, count: int) -> Paired:
    """Records that each take question and text from one sample and the pictures from another.

    Every sample gives its question, and its pictures, once before any gives them again. The draw is always the same:
    what it makes is a part of the data.

    Args:
        records: at least two samples.
        count: how many records to make.

    Returns:
        The records; their answers are still those to the question's own pictures.
    """
    rng = np.random.default_rng(0)
    turns = [rng.permutation(len(records)) for _ in range(-(-count // len(records)))]
    asks = np.concatenate(turns)[:count]
    shows = np.concatenate([np.roll(turn, 1) for turn in turns])[:count]
    return Paired(records, asks, shows)


def answered(records: Source, answers: Callable[[], list[str]], file: Path, key: str) -> Answered:
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
    return Answered(records, rows, [said[row] for row in rows])
