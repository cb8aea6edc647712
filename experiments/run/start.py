"""The initial model of a run: a teacher, a pruned model, or a model to be trained."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from transformers import ProcessorMixin

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint
from antgmm_jax.io.loading import load_processor
from data.source import Source
from experiments.run.checks import check_sizes, check_states
from experiments.run.schema import Recipe, Training
from experiments.run.schema.recipe import fingerprint
from experiments.run.student import Student, cut_record, load_student, teacher_key, whole
from experiments.run.training import fresh, shape_of


class Origin(NamedTuple):
    """Origin of the initial model of a run.

    Attributes:
        teacher: the teacher; None if a model is trained without one.
        processor: processor of the models.
        key: `teacher_key` of the teacher or of the checkpoint that is trained; "" for random parameters.
        parent: folder of the stage with the initial model; "" for none.
    """

    teacher: Student | None
    processor: ProcessorMixin
    key: str
    parent: str


def opening(recipe: Recipe | Training) -> Callable[[Source], tuple[Student, Origin]]:
    """Loads and checks the initial model of a recipe.

    Args:
        recipe: the recipe.

    Returns:
        training records -> (initial model, origin). For random parameters, the tokenizer is trained on the records.

    Raises:
        AntgmmError: the checkpoint does not exist, sizes are not legal, or the stages do not fit the model.
    """
    if isinstance(recipe, Recipe):
        start = _cut_from(recipe)
        return lambda records: start
    shape = shape_of(recipe)

    def begin(records: Source) -> tuple[Student, Origin]:
        if recipe.start:
            model = whole(recipe.start)
            return model, Origin(None, load_processor(recipe.start), teacher_key(model.config, model.weights()), "")
        model, processor = fresh(recipe, shape, records)
        return model, Origin(None, processor, "", "")

    return begin


def decided_by(recipe: Recipe | Training) -> dict[str, str]:
    """Returns digests of a recipe and of the stages of other runs that it reads: its parent and new weights.

    Args:
        recipe: the recipe.

    Returns:
        Name of the input -> digest.
    """
    own = {"recipe": fingerprint(recipe)}
    if not isinstance(recipe, Recipe):
        return own
    places = {f"weights_of_{stage.name}": stage.weights for stage in recipe.stages} | {"parent": recipe.parent}
    outside = {name: place for name, place in places.items() if place not in ("", "kept", "random")}
    return own | {name: checkpoint.stage_digest(place) for name, place in outside.items()}


def _cut_from(recipe: Recipe) -> tuple[Student, Origin]:
    teacher = whole(recipe.teacher.path)
    key = teacher_key(teacher.config, teacher.weights())
    model = _parent(recipe, key) if recipe.parent else teacher
    check_sizes(model, recipe.stages, whole=teacher.keep)
    check_states(teacher.config, recipe)
    made, wanted = model.config.bridge_tokens, teacher.config.bridge_tokens
    if made != wanted and any(stage.loss.bridge for stage in recipe.stages):
        raise AntgmmError(
            f"the bridge of parent {recipe.parent} makes {made} tokens of an image slot, the teacher's {wanted}: cut"
            " the image side again from the teacher, or leave out loss.bridge"
        )
    return model, Origin(teacher, load_processor(recipe.teacher.path), key, recipe.parent)


def _parent(recipe: Recipe, key: str) -> Student:
    if cut_record(Path(recipe.parent))["teacher"] != key:
        raise AntgmmError(f"parent {recipe.parent} was cut from another teacher than {recipe.teacher.path}")
    return load_student(Path(recipe.parent))
