"""What a message says where a remedy needs another recipe, which the folder of the run refuses."""

from pathlib import Path

from experiments.run.folder import RunFolder
from experiments.run.schema import Recipe, Training
from experiments.run.schema.recipe import as_parent


def in_another_run(recipe: Recipe | Training, folder: RunFolder, number: int) -> str:
    """Returns where a changed recipe can run again from a stage on: in another folder, without the stages before it.

    Args:
        recipe: recipe of the run.
        folder: folder of the run.
        number: position of the first changed stage, from 1.

    Returns:
        Words that follow what to change, such as "in another --run". A phase of `antgmm train` has no parent.
    """
    if number == 1 or not isinstance(recipe, Recipe):
        return "in another --run"
    before: Path = folder.stage(number - 1, recipe.stages[number - 2].name)
    return f"in another --run, of a recipe that begins with this stage and has {as_parent(before)}"
