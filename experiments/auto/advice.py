"""What the scores and losses of a run say, with what to try."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from antgmm_jax.io import checkpoint
from antgmm_jax.io.books import read_book
from data.metrics import most_frequent, varied
from data.source import Source
from experiments.auto.look import COUNTED, at_chance, spread
from experiments.run.folder import REPORT, RunFolder
from experiments.run.remedies import in_another_run
from experiments.run.rows.datasets import load_records
from experiments.run.schema import Recipe, Training

FALL = 0.02
"""A loss that falls by less than this part between the first and the last quarter of a stage is flat."""
LEARNT = 0.1
"""A loss below this has little left to fall: answers have a probability of 0.9, or targets are met but for a tenth."""
POINTS = 8
"""Points of a loss curve below which nothing can be said about it."""


def advice(recipe: Recipe | Training, run: Path) -> list[str]:
    """Returns what to try where a finished run has not learnt something.

    Args:
        recipe: recipe of the run.
        run: its folder, with all stages finished; of a training, with its report.
    """
    folder, result, scores = RunFolder(run), [], None
    for work in recipe.work:
        metrics = checkpoint.load_record(folder.stage(work.number, work.stage.name))["metrics"]
        losses = [point["loss"] for point in metrics["history"]]
        if is_flat(losses):
            result.append(
                f"the loss of {work.title} stays at {losses[-1]:.3g}: try a third of its optimizer.learning_rate, three"
                f" times as much, or more steps {in_another_run(recipe, folder, work.number)}"
            )
        scores = metrics.get("scores")
    if isinstance(recipe, Training):
        scores = read_book(folder.report / REPORT).get("scores")
    if scores is not None and (unlearnt := _unlearnt(recipe, scores["by_type"])):
        known = isinstance(recipe, Recipe) and "-" not in unlearnt and not recipe.stages[-1].repeat
        often = ', or show them more often (repeat = "auto" in the last stage)' if known else ""
        result.append(
            f"questions of type {', '.join(unlearnt)} score as the most frequent answer does, they are not learnt: take"
            f" more steps{often} {in_another_run(recipe, folder, len(recipe.work))}"
        )
    return result


def _unlearnt(recipe: Recipe | Training, by_type: Mapping[str, float]) -> list[str]:
    """Question types that score as their most frequent answer does, but for free text."""
    chance = most_frequent(*_answers(load_records(recipe.evaluate.data)))
    if not at_chance(by_type, chance):  # training rows need not be read then
        return []
    # Of the many training rows, whether answers are all different: the prices of a few test rows may be.
    return at_chance(by_type, chance, varied(*_answers(spread(load_records(recipe.data), COUNTED))))


def _answers(records: Source) -> tuple[list[str], list[str]]:
    rows = records.expected()
    return [row.type for row in rows], [row.answer for row in rows]


def is_flat(losses: Sequence[float]) -> bool:
    """Whether a loss curve does not fall, though there is something left to learn.

    Args:
        losses: points of the curve at equal distances.
    """
    quarter = len(losses) // 4
    if len(losses) < POINTS:
        return False
    first, last = (sum(part) / quarter for part in (losses[:quarter], losses[-quarter:]))
    return last > max((1 - FALL) * first, LEARNT)
