"""Additional training records: images of samples with questions of other samples, answered by the teacher."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import ProcessorMixin

from antgmm_jax.axes import to_dict
from antgmm_jax.config import LMMConfig
from antgmm_jax.io.books import read_book, write_book
from antgmm_jax.parallel import preemption
from antgmm_jax.parallel.processes import from_first_process, run_on_first
from antgmm_jax.pure import Params
from data.record import Record, images_first
from data.rows import Row
from data.source import Source
from distill import fingerprint
from experiments.run.folder import held
from experiments.run.host.console import bar, say
from experiments.run.rows.datasets import encoded
from experiments.run.rows.samples import Samples
from experiments.run.schema import Recipe
from experiments.run.scores.evaluation import evaluate

BATCH = 128


def with_pairs(
    recipe: Recipe, samples: Samples, config: LMMConfig, params: Params, processor: ProcessorMixin, folder: Path
) -> Samples:
    """Adds the records of `teacher.pairs` to the samples of a recipe.

    Args:
        recipe: the recipe.
        samples: its samples.
        config: config of the teacher.
        params: parameters of the teacher; `Stored` ones are loaded only if the answers are not in `folder`.
        processor: processor of the teacher.
        folder: folder for the teacher's answers, `KEY.answers.json`.

    Returns:
        All samples.
    """
    pairs = encoded(recipe, paired(samples.records, recipe.teacher.pairs), processor, config)
    # Longer answers would be refused as rows.
    longest, dtype = min(recipe.evaluate.max_new_tokens, recipe.max_answer), recipe.optimizer.dtype
    key = fingerprint(params, f"{json.dumps(to_dict(config))} {dtype} {longest} {pairs.fingerprint}")

    def ask() -> list[str]:
        with bar("answers to pairs", len(pairs), safe_point=preemption.leave) as update:
            limits = {"max_new_tokens": longest, "batch_size": BATCH, "dtype": dtype}
            return evaluate(config, params, pairs, processor, **limits, progress=update)[1]

    def trains(row: int, reply: str) -> bool:
        """Whether a reply is shorter than the teacher's maximum, as a longer one may be cut, and its row fits."""
        tokens = len(processor.tokenizer(pairs.encoder.opening + reply, add_special_tokens=False)["input_ids"])
        return tokens < longest and (not recipe.pack or pairs.rows.index.prompt[row] + tokens < recipe.pack)

    place = folder / key[:16]
    with held(place):
        answered_pairs = answered(pairs.records, ask, place.with_suffix(".answers.json"), key, trains)
    if left_out := len(pairs) - len(answered_pairs):
        run_on_first(lambda: say(f"pairs: {left_out} of {len(pairs)} answers are empty, cut or too long, and left out"))
    return encoded(recipe, Joined(samples.records, answered_pairs), processor, config, trained=True)


class Paired(Source):
    """Records that combine the question and text of one sample with the images of another.

    Args:
        source: the samples.
        asks: number of the sample with the question, for each record.
        shows: number of the sample with the images, for each record.
    """

    def __init__(self, source: Source, asks: np.ndarray, shows: np.ndarray):
        self._source, self._all = source, {"asks": asks, "shows": shows}
        self.path, self.drawn, self.drops_long = source.path, source.drawn, source.drops_long
        self.restore(self._all)

    def __len__(self) -> int:
        return len(self._asks)

    def words(self, index: int) -> Row:
        """Returns a record without images; its answer is still that of the question's own sample."""
        return self._of(index, len(self._source.words(int(self._shows[index])).images))

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        images = self._source[int(self._shows[index])].images
        return Record(**{**vars(self._of(index, len(images))), "images": images})

    def _of(self, index: int, count: int) -> Row:
        """A record without images; of a conversation only the last question, as earlier answers are about others."""
        asks, shows = (self._source.words(int(each[index])) for each in (self._asks, self._shows))
        turns = tuple(turn for turn in asks.turns[:-1] if turn.role == "system") + asks.turns[-1:]
        turns = images_first(turns, count) if turns else ()
        return replace(asks, id=f"{asks.id} on {shows.id}", images=(), turns=turns)

    def digest(self) -> str:
        """Returns a digest of the samples and of the combinations."""
        return _digest(self._source.digest(), *(numbers.tobytes() for numbers in self._all.values()))

    def places(self) -> dict[str, np.ndarray]:
        """Returns the numbers of the samples that are combined."""
        return self._all

    def restore(self, places: Mapping[str, np.ndarray]) -> None:
        """Restores the result of `places`, without the records that are too long."""
        self._asks, self._shows = places["asks"], places["shows"]


class Answered(Source):
    """Selected records of a source, with other answers.

    Args:
        source: the records.
        rows: numbers of the selected records.
        answers: their answers.
    """

    def __init__(self, source: Source, rows: Sequence[int], answers: Sequence[str]):
        self._source, self._rows, self._answers, self.drawn = source, rows, answers, source.drawn

    def __len__(self) -> int:
        return len(self._rows)

    def words(self, index: int) -> Row:
        """Returns a record without images."""
        return replace(self._source.words(self._rows[index]), answer=self._answers[index])

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        return replace(self._source[self._rows[index]], answer=self._answers[index])

    def digest(self) -> str:
        """Returns a digest of the records and their answers."""
        return _digest(self._source.digest(), repr((self._rows, self._answers)).encode())


class Joined(Source):
    """The records of two sources, one after the other."""

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
        """Returns a record without images."""
        source, place = self._part(index)
        return source.words(place)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        source, place = self._part(index)
        return source[place]

    def digest(self) -> str:
        """Returns a digest of both sources."""
        return _digest(*(part.digest() for part in self._parts))


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
    return digest.hexdigest()


def paired(records: Source, count: int) -> Paired:
    """Creates records that combine the question and text of one sample with the images of another.

    All samples are used equally often. The combinations are always the same, as they are part of the data.

    Args:
        records: at least two samples.
        count: number of records.

    Returns:
        The records, with the answers of the questions' own samples.
    """
    rng = np.random.default_rng(0)
    turns = [rng.permutation(len(records)) for _ in range(-(-count // len(records)))]
    asks = np.concatenate(turns)[:count]
    shows = np.concatenate([np.roll(turn, 1) for turn in turns])[:count]
    return Paired(records, asks, shows)


def answered(
    records: Source,
    answers: Callable[[], list[str]],
    file: Path,
    key: str,
    trains: Callable[[int, str], bool] = lambda row, reply: True,
) -> Answered:
    """Replaces answers by those of a model, which are cached in a file; empty and unfit ones are left out.

    Args:
        records: the records.
        answers: computes the model's answer to each record.
        file: JSON file of the cache.
        key: key of model and records; cached answers with another key are not used.
        trains: (row, answer) -> whether the record can be trained.

    Returns:
        The records.
    """

    def kept() -> list[str] | None:
        stored = read_book(file) if file.exists() else {}
        return stored["answers"] if stored.get("key") == key else None

    replies = kept() if from_first_process(lambda: kept() is not None) else None
    if replies is None:
        replies = answers()
        run_on_first(lambda: write_book(file, {"key": key, "answers": replies}))
    rows = [row for row, answer in enumerate(replies) if answer and trains(row, answer)]
    return Answered(records, rows, [replies[row] for row in rows])
