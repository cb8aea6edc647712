"""Choices of a run that its test records took part in."""

from os.path import abspath
from pathlib import Path

from experiments.run.files import MARK
from experiments.run.schema import Recipe

SEARCH = "search.json"
"""File of a search beside the runs of its students."""


def choices(run: Path, recipe: Recipe, types: int) -> list[str]:
    """Returns what scores or losses on the test records have chosen, as far as recipe and folder say so.

    A plan that was copied or edited elsewhere leaves no trace but its stages.

    Args:
        run: folder of the run.
        recipe: its recipe.
        types: number of question types of the test records.

    Returns:
        Phrases for the report; empty if nothing is known to be chosen by the test records.
    """
    run, result = Path(abspath(run)), []
    if run.name.isdecimal() and (run.parent / SEARCH).exists():
        result.append("the size of the student (--keep-quality)")
    if _is_plan(run.with_name(f"{run.name}.toml")):
        result.append("prompt and optimizer, where the plan compared several")
    # The visits follow from the scores of the stage before, which the first stage of a teacher has not.
    after_scores = recipe.stages if recipe.parent else recipe.stages[1:]
    if types > 1 and any(stage.repeat == "auto" for stage in after_scores):
        result.append('how often training shows each question type (repeat = "auto")')
    return result


def _is_plan(recipe: Path) -> bool:
    """Whether a file is the written plan of a compression."""
    if not recipe.is_file():
        return False
    with recipe.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()
