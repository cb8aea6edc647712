"""The recipe of a plan: stages tower by tower, with steps, batches and rates from model, rows and time."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig, on_image_side
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family
from antgmm_jax.parallel.sharding import padded_batch_size
from distill import LossConfig
from distill.losses import TERMS
from experiments.auto.goal import Goal
from experiments.auto.look import COARSE, FEW
from experiments.auto.sizing import by_side
from experiments.run.progress.forecast import Rows, parts, seconds
from experiments.run.schema import Recipe
from experiments.run.schema.recipe import recipe_of

IMAGE_VISITS, LANGUAGE_VISITS = 300_000, 80_000
"""Samples that the stages of a plan see: its aim. The demo has 460 800 and 124 800, from 16 000 rows."""
EPOCHS = 20
"""Most visits of each row on the image side; more only learn its pictures by heart."""
WIDTH = 128
"""Largest width of the models on which the learning rates were tuned; wider ones take proportionally lower rates."""
IMAGE_RATE, LANGUAGE_RATE = 1e-2, 3e-3
DECAY = 0.1
"""Ten times the usual weight decay: +15 points in docs/lab/calibration.md."""
LARGE, SMALL, ENOUGH = 64, 16, 600
"""Rows a step of the stage at the constant rate are `LARGE` if that leaves `ENOUGH` steps, else `SMALL`; those of the
last stage are `SMALL`. What is learnt suddenly was learnt within 600 steps of 64 in each of five runs, and with
batches of 16 in one of three (docs/lab/tasks.md)."""
LONGEST, FEWEST = 3.0, 20
"""Steps are at most this multiple of the aim, and at least this many."""
IMAGE = 0.2
"""Part of the training's time that the image side gets where time is short: its steps are cheap, its losses stay."""
SCORED = 0.2
"""Largest part of the time for the scores on test records."""
LOST, SAVED = 300.0, (10, 500)
"""Seconds of training that a killed run loses at most, and limits of the steps between its checkpoints."""


class Tuned(NamedTuple):
    """Settings of the language stages.

    Attributes:
        kind: optimizer.
        rate: learning rate as a multiple of the default.
    """

    kind: str = "muon"
    rate: float = 1.0


class Scale(NamedTuple):
    """Factors on the numbers of steps of the image side and of the language model."""

    image: float
    text: float


def base(goal: Goal, data: Mapping[str, Any], test: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tables of a recipe without its stages.

    Args:
        goal: the goal.
        data: data table of the training records.
        test: data table of the test records.
    """
    return {
        "seed": 0,
        "calibration_batches": 4,
        "max_length": 4096,
        "max_answer": 1024,
        "teacher": {"path": goal.model},
        "data": dict(data),
        "loss": {"hard": 1.0},
        "optimizer": {
            "kind": "muon",
            "learning_rate": LANGUAGE_RATE,
            "batch_size": 16,
            "b2": 0.98,
            "weight_decay": DECAY,
        },
        "evaluate": {"data": dict(test)},
    }


def draft(tables: Mapping[str, Any]) -> Recipe:
    """Returns a recipe that cuts nothing, to read model and data with."""
    return recipe_of({**tables, "stage": [{"name": "draft", "recover_steps": 1}]}, "plan")


def stages(config: LMMConfig, wanted: Mapping[str, int], rows: int, scale: Scale, tuned: Tuned) -> list[dict[str, Any]]:
    """Returns the stages of a plan: image side, language model, and the same while the learning rate falls to zero.

    Args:
        config: config of the teacher.
        wanted: axis -> units of the student.
        rows: number of training rows.
        scale: factors on the numbers of steps.
        tuned: settings of the language stages.
    """
    image, text = by_side(config, wanted)
    large, small = _batch(LARGE, rows), small_batch(rows)
    result = []
    if image:
        steps = _steps(scale.image * min(IMAGE_VISITS, EPOCHS * max(rows, FEW)), large)
        optimizer = {"learning_rate": _rate(IMAGE_RATE, config, wanted, "vision/embed"), "batch_size": large}
        result.append(
            {
                "name": "image",
                "frozen": ["language"],
                "importance": _importance(config, image),
                "recover_steps": steps,
                "shift": 1,
                "loss": {"hard": 0.0, "bridge": 1.0, "bridge_tokens": "sensitivity"},
                "optimizer": {**optimizer, "warmup": _warmup(steps)},
                "sizes": image,
            }
        )
    half = scale.text * LANGUAGE_VISITS / 2
    first = large if half >= ENOUGH * large else small
    language = language_stage(config, text, tuned, _steps(half, first), first)
    language["optimizer"]["schedule"] = "constant"
    settle = language_stage(config, text, tuned, _steps(half, small), small)
    settle = {name: value for name, value in settle.items() if name not in ("importance", "sizes")}
    return [*result, {"name": "language", **language}, {"name": "settle", "repeat": "auto", **settle}]


def with_stages(
    tables: Mapping[str, Any], config: LMMConfig, wanted: Mapping[str, int], rows: int, scale: Scale, tuned: Tuned
) -> dict[str, Any]:
    """Returns the tables of a recipe with the stages of a plan.

    Args:
        tables: from `base`.
        config: as in `stages`.
        wanted: as in `stages`.
        rows: as in `stages`.
        scale: as in `stages`.
        tuned: as in `stages`.
    """
    each = stages(config, wanted, rows, scale, tuned)
    # The stage of the image side has its own loss alone: it would inherit the other terms, and run the language model.
    others = {term: 0.0 for term in TERMS if term in tables["loss"]}
    each = [{**stage, "loss": {**others, **stage["loss"]}} if "loss" in stage else stage for stage in each]
    if tables["teacher"].get("mode") == "online":  # for the losses that read it, it would read the shifted pictures
        read = LossConfig(**tables["loss"]).reads_teacher
        each = [{**stage, "shift": 0} if read or "loss" in stage else stage for stage in each]
    return {**tables, "stage": each}


def language_stage(config: LMMConfig, text: Mapping[str, int], tuned: Tuned, steps: int, batch: int) -> dict[str, Any]:
    """Returns a stage that cuts and trains the language model, without its name.

    Args:
        config: config of the teacher.
        text: axis -> units to cut in it.
        tuned: optimizer and rate.
        steps: number of steps.
        batch: rows a step.
    """
    # An image side that cannot be cut first is cut and trained with the language model.
    whole = any(on_image_side(axis) for axis in text)
    optimizer = {
        "kind": tuned.kind,
        "learning_rate": _rate(LANGUAGE_RATE * tuned.rate, config, text, "text/embed"),
        "batch_size": batch,
        "warmup": _warmup(steps),
    }
    stage = {"recover_steps": steps, "shift": 1, "optimizer": optimizer}
    if not whole:
        stage["frozen"] = list(family(config).features)
    return stage | ({"importance": _importance(config, text), "sizes": dict(text)} if text else {})


class Machine(NamedTuple):
    """What decides how long a run takes.

    Attributes:
        rows: statistics of the data.
        rate: FLOP/s of a matrix product, from `experiments.run.progress.forecast.matmul_rate`.
        spent: seconds that the plan itself took.
        without: titles of parts that the run leaves out.
        teacher: config of the teacher, if the run starts from a smaller model.
    """

    rows: Rows
    rate: float
    spent: float
    without: tuple[str, ...] = ()
    teacher: LMMConfig | None = None

    def scoring(self, rows: int) -> "Machine":
        """The same with another number of test records."""
        return self._replace(rows=self.rows._replace(scored=rows))


class Fitted(NamedTuple):
    """A recipe with as many steps as the time allows.

    Attributes:
        raw: its tables.
        seconds: expected duration of its run.
        scale: its steps, as a part of the aim.
        aim: expected duration with the steps of the aim.
    """

    raw: dict[str, Any]
    seconds: float
    scale: Scale
    aim: float

    @property
    def order(self) -> tuple[float, float]:
        """Key for the best of several: most steps, then the shortest duration."""
        return round(self.scale.image + self.scale.text, 2), -self.seconds


def fitted(
    goal: Goal, tables: Mapping[str, Any], config: LMMConfig, wanted: Mapping[str, int], machine: Machine, tuned: Tuned
) -> Fitted:
    """Returns the tables of the recipe with as many steps as the time allows.

    Args:
        goal: the goal, with the minutes; 0 for the steps of the demo, within `MOST_MINUTES`.
        tables: from `base`.
        config: config of the teacher.
        wanted: axis -> units of the student.
        machine: what decides the duration.
        tuned: settings of the language stages.
    """

    def written(image: float, text: float) -> tuple[dict[str, Any], list[tuple[str, float]]]:
        raw = with_stages(tables, config, wanted, machine.rows.trained, Scale(image, text), tuned)
        return raw, _expected(raw, config, machine)

    def duration(image: float, text: float) -> float:
        return _total(written(image, text)[1])

    few = duration(0.01, 0.01)
    of_image, of_text = duration(1.0, 0.01) - few, duration(0.01, 1.0) - few
    left = goal.seconds - machine.spent - few
    most = LONGEST if goal.minutes else 1.0
    both = left / (of_image + of_text)
    image = max(both, min(1.0, IMAGE * left / of_image)) if of_image else 1.0
    image = max(0.01, min(most, image))

    def affordable(each: float) -> float:
        return max(0.01, min(most, (left - image * of_image) / each))

    text = affordable(of_text)
    if (longer := duration(0.01, text) - few) > 0:  # with fewer steps the batches are smaller, and a row takes longer
        text = affordable(longer / text)
    raw, times = written(image, text)
    every = {"checkpoint_every": saved_every(raw, dict(times))}
    return Fitted({**every, **raw}, _total(times), Scale(image, text), few + of_image + of_text)


def saved_every(raw: Mapping[str, Any], times: Mapping[str, float]) -> int:
    """Returns the number of steps between checkpoints, of which those of the slowest stage take `LOST` seconds.

    Args:
        raw: tables of the recipe.
        times: title of each part of the run -> expected seconds.
    """
    slowest = max(times[work.title] / work.stage.steps for work in recipe_of(raw, "plan").work)
    least, most = SAVED
    return max(least, min(most, int(LOST / slowest)))


def scored_rows(
    goal: Goal, tables: Mapping[str, Any], config: LMMConfig, wanted: Mapping[str, int], machine: Machine
) -> int:
    """Returns the number of test records to score after every stage and in the report, of teacher and student.

    Args:
        goal: the goal, with the minutes.
        tables: from `base`.
        config: config of the teacher.
        wanted: axis -> units of the student.
        machine: what decides the duration, with the number of all test records.

    Returns:
        All of them, or as many as take `SCORED` of the time, but not fewer than `COARSE` unless there are fewer.
    """
    rows = machine.rows.scored
    raw = with_stages(tables, config, wanted, machine.rows.trained, Scale(1.0, 1.0), Tuned())
    every, none = (_total(_expected(raw, config, machine.scoring(scored))) for scored in (rows, 0))
    affordable = SCORED * goal.seconds / (every - none)
    return rows if affordable >= 1 else min(rows, max(COARSE, int(affordable * rows)))


def _expected(raw: Mapping[str, Any], config: LMMConfig, machine: Machine) -> list[tuple[str, float]]:
    """Title and expected seconds of each part of the run of a recipe's tables."""
    every = parts(recipe_of(raw, "plan"), config, machine.rows, machine.teacher)
    return [(part.title, seconds(part, machine.rate)) for part in every if part.title not in machine.without]


def _total(times: Iterable[tuple[str, float]]) -> float:
    return sum(each for _, each in times)


def _steps(visits: float, batch: int) -> int:
    return max(FEWEST, round(visits / batch))


def small_batch(rows: int) -> int:
    """Returns the batch size of the last stage for a number of training rows."""
    return _batch(SMALL, rows)


def _batch(most: int, rows: int) -> int:
    """A batch size for a number of training rows, a multiple of the devices that share a batch."""
    return padded_batch_size(min(most, max(1, rows // 4)))


def _warmup(steps: int) -> int:
    return min(20, steps // 5)


def _rate(rate: float, config: LMMConfig, wanted: Mapping[str, int], axis: str) -> float:
    """A learning rate for the width of the student, with two digits."""
    width = wanted.get(axis, sizes(config)[axis])
    return float(f"{rate * min(1.0, WIDTH / width):.2g}")


def _importance(config: LMMConfig, axes: Mapping[str, int]) -> dict[str, str]:
    """Patterns of importance methods: of activations, but for layers and, where possible, the image encoder's width."""
    patterns = {"*/layers": "block_influence"} if any(axis.endswith("/layers") for axis in axes) else {}
    if "vision/embed" in axes and _has_basis(config, "vision/embed"):
        patterns["vision/embed"] = "principal"
    return {**patterns, "*": "activation"}


def _has_basis(config: LMMConfig, axis: str) -> bool:
    try:
        pruning.check_basis(config, axis)
    except AntgmmError:
        return False
    return True
