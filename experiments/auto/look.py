"""A look at model and data before a plan: can the teacher answer the rows, and are there enough of them?"""

import hashlib
from collections.abc import Mapping
from math import ceil, inf
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from transformers import ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.loading import load_processor
from data.collate import bucket
from data.metrics import most_frequent, normal, varied
from data.record import Record
from data.rows import Row
from data.source import Source, evenly
from experiments.report.figures import ABOVE, VARIED
from experiments.run.progress.flops import pass_flops
from experiments.run.progress.forecast import SHARE, matmul_rate
from experiments.run.rows.datasets import check_apart, encoded, load_both
from experiments.run.rows.samples import Samples
from experiments.run.schema import Recipe
from experiments.run.scores.scoring import scored
from experiments.run.student import Student

CHECKED = 200
"""Maximum number of held-out rows that the teacher answers before a plan."""
PART = 0.1
"""Part of the time of a plan and its run for the teacher's answers to them."""
FEWEST = 24
"""Held-out rows that are read whatever time they take, if there are as many."""
COUNTED = 2000
"""Maximum number of training rows of which the most frequent answers are counted."""
FEW = 1000
"""Below this number of training rows, a student loses tens of points (docs/lab/calibration.md)."""
COARSE = 100
"""Below this number of held-out rows, a score says little."""


class Look(NamedTuple):
    """Model and data of a plan.

    Attributes:
        teacher: the model.
        processor: its processor.
        trained: training records.
        held: some held-out records.
        tested: number of held-out records.
        score: exact match of the teacher on `held`, the mean over question types.
        by_type: question type -> exact match of the teacher.
        chance: question type -> share of its most frequent answer among training records.
        varied: share of different answers among training records.
        rouge: ROUGE-L of the teacher on `held`.
        varied_by_type: question type -> share of different answers among training records.
    """

    teacher: Student
    processor: ProcessorMixin
    trained: Samples
    held: Samples
    tested: int
    score: float
    by_type: dict[str, float]
    chance: dict[str, float]
    varied: float = 0.0
    rouge: float = 0.0
    varied_by_type: Mapping[str, float] = MappingProxyType({})

    @property
    def guessed(self) -> float:
        """Exact match of the most frequent answers, the mean over the question types of `by_type`."""
        return float(np.mean([self.chance.get(kind, 0.0) for kind in self.by_type]))


def look_at_both(draft: Recipe, teacher: Student, seconds: float = inf) -> Look:
    """Loads the records of a recipe, and lets the teacher answer some held-out ones.

    Args:
        draft: recipe with teacher, data and evaluation; its stages do not matter.
        teacher: the teacher.
        seconds: time of the plan and its run.

    Returns:
        What a plan needs to know.

    Raises:
        AntgmmError: as in `open_hf` and `Samples`.
    """
    processor = load_processor(draft.teacher.path)
    records, tests = load_both(draft)
    trained = encoded(draft, records, processor, teacher.config, trained=True)
    dtype = draft.optimizer.dtype
    held = encoded(draft, spread(tests, CHECKED), processor, teacher.config)
    if (most := rows_in(PART * seconds, teacher.config, held, dtype)) < len(held):
        held = encoded(draft, spread(tests, most), processor, teacher.config)
    check_apart(records, tests)
    title = f"teacher on {len(held)} held-out rows"
    limits = {"max_new_tokens": longest_answer(trained, held), "dtype": dtype}
    figures, _ = scored(title, teacher.config, teacher.weights(), held, processor, **limits)
    # Of training rows, because the most frequent answers of a few held-out rows are frequent by chance.
    words = spread(trained.records, COUNTED).expected()
    given = [row.type for row in words], [row.answer for row in words]
    return Look(
        teacher,
        processor,
        trained,
        held,
        len(tests),
        figures["exact_match"],
        figures["by_type"],
        most_frequent(*given),
        len({normal(row.answer) for row in words}) / len(words),
        figures["rouge_l"],
        varied(*given),
    )


def longest_answer(*samples: Samples) -> int:
    """Returns the number of tokens of the longest answer that is generated, the last one of a conversation."""
    return bucket(max(int(each.rows.index.answer.max()) for each in samples))


def rows_in(seconds: float, config: LMMConfig, samples: Samples, dtype: str) -> int:
    """Returns how many rows a model reads in a duration, by its FLOPs and the rate of a matrix product.

    Args:
        seconds: the duration.
        config: model config.
        samples: rows of the usual lengths.
        dtype: dtype of computation.

    Returns:
        Number of rows, at least `FEWEST`.
    """
    mean = {name: total / len(samples) for name, total in samples.totals.items()}
    answer = ceil(mean["answer"])
    length = ceil(mean["text"]) - (0 if config.encoder_decoder else answer)
    flops = sum(pass_flops(config, 1, length=length, answer=answer, slots=mean["slots"]).values())
    most = seconds * SHARE * matmul_rate(dtype) / flops
    return max(FEWEST, int(min(most, len(samples))))


def spread(records: Source, most: int) -> Source:
    """Returns at most `most` records at equal distances."""
    return _Some(records, evenly(len(records), most))


class _Some(Source):
    """Some records of a source."""

    def __init__(self, source: Source, rows: np.ndarray):
        self._source, self._all, self._rows, self.path = source, rows, rows, source.path
        self.drops_long = source.drops_long

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._source[int(self._rows[index])]

    def read(self, index: int) -> Record:
        """Reads a record that may be invalid."""
        return self._source.read(int(self._rows[index]))

    def check(self, bad: Mapping[int, str]) -> None:
        """Raises one error that lists all invalid records of the source."""
        self._source.check({int(self._rows[index]): reason for index, reason in bad.items()})

    def places(self) -> dict[str, np.ndarray]:
        """Returns the numbers of the records in their source."""
        return {"rows": self._all}

    def restore(self, places: Mapping[str, np.ndarray]) -> None:
        """Restores the result of `places`."""
        self._rows = places["rows"]

    def words(self, index: int) -> Row:
        """Returns a record without its images."""
        return self._source.words(int(self._rows[index]))

    def digest(self) -> str:
        """Returns a digest of the source and of the row numbers."""
        return hashlib.sha256(f"{self._source.digest()} {self._all.tolist()}".encode()).hexdigest()


def warnings(seen: Look) -> list[str]:
    """Returns what makes a good student unlikely, with what to try.

    Args:
        seen: the look.
    """
    rows, guessed = len(seen.trained), seen.guessed
    result = []
    if is_free(seen):
        result.append(_free(seen))
    elif seen.score < min(guessed + ABOVE, 1.0):
        result.append(
            f"the teacher's answers score {seen.score:.2f}, the most frequent answers {guessed:.2f}: a student cannot"
            " learn the task from it. Compare the prompt and the form of the answers (antgmm eval --answers), or train"
            " the teacher on these rows first (antgmm train)"
        )
    elif unknown := at_chance(seen.by_type, seen.chance, seen.varied_by_type):
        result.append(
            f"the teacher does not know questions of type {', '.join(unknown)}: it stands at the most frequent answer"
        )
    if rows < FEW:
        result.append(f"{rows} training rows are few: below {FEW} a student loses tens of points; bring more rows")
    if seen.tested < COARSE:
        result.append(
            f"{seen.tested} held-out rows are few: a score is uncertain by {50 / seen.tested**0.5:.0f} points; name"
            " more of them with --test"
        )
    if len(seen.by_type) == 1:
        result.append(
            "all held-out rows are of one question type: what is learnt last is neither named nor shown more often;"
            ' give rows that ask different things a "type"'
        )
    if len(seen.by_type) == 1 and guessed > 0.9:
        result.append("nearly all answers are equal: scores say little; bring rows with other answers")
    return result


def is_free(seen: Look) -> bool:
    """Whether the answers are free text: most are different, and the teacher does not repeat them word by word."""
    return seen.varied > VARIED and seen.score < seen.guessed + ABOVE


def _free(seen: Look) -> str:
    return (
        f"{seen.varied:.0%} of the answers are different texts, which exact match does not measure: compare token_loss"
        f" and rouge_l of the scores (teacher: rouge_l {seen.rouge:.2f})"
    )


def check_quality(seen: Look) -> None:
    """Checks that the teacher has a quality that a student can keep.

    Args:
        seen: the look.

    Raises:
        AntgmmError: the answers are free text, or the most frequent ones score more than the teacher.
    """
    if is_free(seen):
        raise AntgmmError(f"--keep-quality compares exact match: {_free(seen)}; give --smaller or --params")
    if seen.score < seen.guessed:
        raise AntgmmError(f"--keep-quality: {warnings(seen)[0]}")


def at_chance(
    by_type: Mapping[str, Any],
    chance: Mapping[str, float],
    different: Mapping[str, float] = MappingProxyType({}),
    margin: float = ABOVE / 2,
) -> list[str]:
    """Returns the question types with scores at most `margin` above their most frequent answer.

    Types of which most answers are different are left out: exact match hardly measures free text.

    Args:
        by_type: question type -> exact match.
        chance: question type -> share of its most frequent answer.
        different: question type -> share of different answers.
        margin: difference that counts as better.
    """
    close = [kind for kind, value in by_type.items() if value < chance.get(kind, 0.0) + margin < 1.0]
    return [kind or "-" for kind in close if different.get(kind, 0.0) <= VARIED]
