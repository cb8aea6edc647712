"""How often a stage with `repeat = "auto"` shows each question type."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from antgmm_jax.io import checkpoint
from antgmm_jax.parallel.processes import run_on_first
from experiments.run.host.console import say
from experiments.run.schema import Work

# After the demo's language model had learnt all types alike ("Comparing is learnt last" in docs/lab/calibration.md),
# these values give 4 visits of price match, 4 of verdict and 1 of brand match (1.5 before rounding); by hand: 4, 4, 2.
MOST = 4
"""Most visits of a row per epoch."""
LEAST = 0.05
"""Smaller mean gaps are noise: the types are shown alike."""


def visits(scores: Mapping[str, float], teacher: Mapping[str, float]) -> dict[str, int]:
    """Returns how often an epoch should visit the rows of the question types that are learnt slowly.

    The visits of a type are its gap to the teacher divided by the mean gap, rounded, from 1 to `MOST`.

    Args:
        scores: question type -> exact match of the model before the stage.
        teacher: question type -> exact match of the teacher on the same records.

    Returns:
        Question type -> number of visits, only of types with more than one. A type that only one of them has, such as
        one of the test rows of a parent run, has none.
    """
    gaps = {kind: max(0.0, teacher[kind] - score) for kind, score in scores.items() if kind in teacher}
    mean = max(LEAST, sum(gaps.values()) / max(1, len(gaps)))
    times = {kind: min(MOST, round(gap / mean)) for kind, gap in gaps.items()}
    return {kind: n for kind, n in times.items() if n > 1}


def with_visits(
    work: Work, before: Path | None, teacher: Callable[[], Mapping[str, Any]], types: Collection[str]
) -> Work:
    """Returns a stage with numbers instead of `repeat = "auto"`; they depend only on finished work.

    Args:
        work: the stage.
        before: folder of the stage before; None if the stage starts from the teacher.
        teacher: returns the scores of the teacher; called only if there are several types.
        types: question types of the training records.
    """
    if work.stage.repeat != "auto":
        return work
    metrics = {} if before is None else checkpoint.load_record(before).get("metrics", {})
    scores = metrics.get("scores", {}).get("by_type", {})
    table = visits(scores, teacher()["by_type"]) if len(scores) > 1 else {}
    table = {kind: n for kind, n in table.items() if kind in types}
    shown = ", ".join(f"{kind} {n} times" for kind, n in table.items()) or "none"
    run_on_first(lambda: say(f"{work.title}: question types that are shown more often: {shown}"))
    return work._replace(stage=work.stage.model_copy(update={"repeat": table}))
