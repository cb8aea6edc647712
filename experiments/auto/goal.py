"""What a user wants: a model, its data, and a budget."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import check_regular
from experiments.run.files import MARK

LONGEST_LINE = 1 << 16
"""Bytes of the first line of a written plan, which holds its goal, that are read."""


class Goal(NamedTuple):
    """The goal of a compression; it has one of `smaller`, `params` and `latency_ms`, or `keep`.

    Attributes:
        model: Hugging Face folder of the teacher, or a name of the Hub.
        data: records to train on, as a data table of a recipe.
        test: other records for the scores, in the same form.
        smaller: how many times fewer parameters the student has; 0 if not set.
        params: maximum number of parameters; 0 if not set.
        latency_ms: maximum milliseconds of a request on this machine; 0 if not set.
        keep: share of the teacher's score that the smallest student keeps; 0 if not set. A goal of one of the students
            of this search has `params` too.
        multiple: number of which the student's widths and MLP units are multiples; 0 if any will do.
        minutes: duration that the run should take; 0 for as long as the steps need, at most `MOST_MINUTES`.
        changes: `key=value` changes of the recipe outside its stages, such as the prompt.
    """

    model: str
    data: dict[str, Any]
    test: dict[str, Any]
    smaller: float = 0.0
    params: int = 0
    latency_ms: float = 0.0
    keep: float = 0.0
    multiple: int = 0
    minutes: float = 0.0
    changes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Time for the plan and its run."""
        return 60 * (self.minutes or MOST_MINUTES)


MOST_MINUTES = 30.0
"""Duration of a run for which no number of minutes is given."""
PARTS = 4
"""A student of a search takes this part of its time."""


STAGES = ("image", "language", "settle")
"""Names of the stages that a plan can have."""


def key_of(change: str) -> str:
    """Returns the key of a `key=value` change."""
    return change.partition("=")[0].strip()


def stage_of(change: str) -> str | None:
    """Returns the name of the stage that a `key=value` change is for; None for a change outside the stages."""
    table, _, rest = change.strip().partition(".")
    return rest.partition(".")[0] if table == "stage" else None


def marked(goal: Goal) -> str:
    """Returns the first line of the plan of a goal."""
    return f"{MARK}{json.dumps(goal._asdict())}"


def is_planned(plan: Path, goal: Goal) -> bool:
    """Whether the plan of a goal is written already.

    Args:
        plan: file of the plan.
        goal: the goal.

    Raises:
        AntgmmError: the file is something else, or the plan of another goal.
    """
    if not plan.exists():
        return False
    check_regular(plan)
    with plan.open("rb") as file:
        first = file.readline(LONGEST_LINE).decode(errors="replace").rstrip("\n")
    if first == marked(goal):
        return True
    if not first.startswith(MARK):
        raise AntgmmError(f"{plan} exists and is no plan: choose another --run")
    raise AntgmmError(f"{plan} is the plan of other options: choose another --run, or remove it with the run's folder")


def parameters(text: str) -> int:
    """Parses a number of parameters, such as "7955971" or "10M".

    Raises:
        AntgmmError: it is not a positive number.
    """
    number = text.strip()
    factor = {"k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}.get(number[-1:], 0.0)
    try:
        value = float(number[:-1]) * factor if factor else int(number)
    except ValueError:
        value = 0
    if not 1 <= value < float("inf"):
        raise AntgmmError(f"--params {text}: write the maximum number of parameters, such as 10M or 7955971")
    return int(value)


def ratio(text: str) -> float:
    """Parses how many times smaller a student is, such as "8x" or "8".

    Raises:
        AntgmmError: it is not a number from 1 to a million.
    """
    try:
        value = float(text.strip().removesuffix("x"))
    except ValueError:
        value = 0.0
    if not 1 < value <= 1e6:
        raise AntgmmError(f"--smaller {text}: write how many times fewer parameters, such as 8x")
    return value


def share(text: str) -> float:
    """Parses a share of the teacher's score, such as "98%" or "0.98".

    Raises:
        AntgmmError: it is not between 0 and 1.
    """
    number, percent, _ = text.strip().partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise AntgmmError(f"--keep-quality {text}: write the share of the teacher's score to keep, such as 98%")
    return value
