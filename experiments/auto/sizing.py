"""Sizes of a student within the budget of a goal, from measured sensitivity and analytic cost."""

import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from math import ceil
from typing import NamedTuple

import jax.numpy as jnp

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig, on_image_side
from antgmm_jax.families import complete
from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.sharding import padded_batch_size
from data.record import Arrays
from experiments.auto.goal import Goal
from experiments.auto.look import Look, longest_answer
from experiments.auto.sensitivity import InTime, closed, factors, increases, reduced
from experiments.lab.planning.rates import RequestSize, calibrate, predict
from experiments.lab.planning.search import by_latency, by_parameters, export_dtype, time_request
from experiments.report.model_times import request_of
from experiments.run.batch_size import rows_that_fit, saved_bytes
from experiments.run.calibration import calibration_batches, importance_on
from experiments.run.host.console import bar
from experiments.run.rows.samples import Samples
from experiments.run.student import Student, whole
from pruning.costs import total_parameters
from pruning.planning import illegal_reason
from pruning.sizing import Sized

DEPTH = 0.3
"""Value of the sublayers that a request passes through, relative to that of the parameters."""
DEPTH_OF_DECODER = 3
"""Layers that a language model without an encoder keeps."""
REQUEST = (64, 8)
"""Prompt and answer tokens of a typical request."""
BATCH = 8
"""Rows of a batch for sensitivity; with little time there is one batch, and fewer rows would say nothing."""
FEWEST, MOST, MEASURED = 4, 16, 1000
"""Batches with enough time: as many as hold this number of answer tokens, within these bounds."""
PASS = 1 / 8
"""Part of the time for each of the two passes of importance; the pass of the sensitivity evaluates a batch per axis."""


class Sensitivity(NamedTuple):
    """Sensitivity of a model.

    Attributes:
        increases: axis -> increase of the loss when most of the axis is closed without training.
        left: axis -> units that were left.
        rows: rows that importance and sensitivity were measured on.
        wanted: the same with enough time.
    """

    increases: dict[str, float]
    left: dict[str, int]
    rows: int
    wanted: int

    def factors(self, config: LMMConfig) -> dict[str, float]:
        """Returns factors on the weights of axes for `pruning.search`.

        Args:
            config: config of the model.
        """
        present = sizes(config)
        return factors(self.increases, {axis: present[axis] / units for axis, units in self.left.items()})


class Chosen(NamedTuple):
    """Sizes of a student.

    Attributes:
        sized: sizes, config and cost.
        sensitivity: the sensitivity that they follow from.
        milliseconds: measured milliseconds of a request; 0 for a budget of parameters.
    """

    sized: Sized
    sensitivity: Sensitivity
    milliseconds: float = 0.0


def chosen(goal: Goal, seen: Look, seed: int, dtype: str, seconds: float) -> Chosen:
    """Searches the sizes of a goal.

    Args:
        goal: the goal.
        seen: model and data.
        seed: seed of the calibration batches.
        dtype: dtype of computation.
        seconds: time for the sensitivity.

    Returns:
        The sizes.

    Raises:
        AntgmmError: no legal model is within the budget, or the teacher itself is.
    """
    config = seen.teacher.config
    if not goal.latency_ms:
        return within(seen.teacher, seen.trained, _parameters(goal, config), seed, dtype, seconds, goal.multiple)
    sensitivity = _sensitivity(seen.teacher, seen.trained, seed, dtype, seconds)
    weights, least, pins = sensitivity.factors(config), fewest_layers(config), unseen(config, seen.trained)
    search = partial(pruning.search, config, pins=pins, weights=weights, multiple=goal.multiple, least=least)
    (request, prompt), timed_in = longest_request(seen.held), export_dtype(goal.changes)
    with sharding.without_mesh():  # a request is answered by one device
        rates = calibrate(config, request, prompt, timed_in)
        price = lru_cache(maxsize=None)(partial(predict, rates, request=request))
        timed = partial(time_request, prompt=prompt, answer=request.answer, dtype=timed_in)
        best, _ = by_latency(config, goal.latency_ms, search, price, timed)
    return Chosen(best.sized, sensitivity, best.measured)


def within(
    model: Student,
    samples: Samples,
    parameters: int,
    seed: int,
    dtype: str,
    seconds: float,
    multiple: int = 0,
) -> Chosen:
    """Searches the sizes for a number of parameters.

    Args:
        model: the model to cut: the teacher, or a student that is cut further.
        samples: training records.
        parameters: maximum number of parameters.
        seed: seed of the calibration batches.
        dtype: dtype of computation.
        seconds: time for the sensitivity.
        multiple: number of which widths and MLP units are multiples; 0 if any will do.

    Returns:
        The sizes.

    Raises:
        AntgmmError: no legal model is within the budget, or the model itself is.
    """
    config = model.config
    search = partial(pruning.search, config, pins=unseen(config, samples), multiple=multiple)
    by_parameters(config, parameters, search)  # refuses what no weights change, before anything is measured
    sensitivity = _sensitivity(model, samples, seed, dtype, seconds)
    weights, value = sensitivity.factors(config), value_of(config)
    search = partial(search, weights=weights, value=value, least=fewest_layers(config))
    return Chosen(by_parameters(config, parameters, search), sensitivity)


def fewest_layers(config: LMMConfig) -> dict[str, int]:
    """Returns how many layers a plan leaves to a language model without an encoder, if the budget allows it: three.

    The position that answers must read from the question what to look at, look there, and compare what it sees. With
    one layer no student learnt to name what is at a place of a photograph, which takes two of these steps; with two
    layers none learnt to compare digits at two places, with three layers one did at once (docs/lab/tasks.md). With an
    encoder there are more steps already.

    Args:
        config: config of the model to cut.
    """
    layers = sizes(config).get("text/layers", 0)
    return {"text/layers": min(DEPTH_OF_DECODER, layers)} if layers > 1 and not config.encoder_decoder else {}


def unseen(config: LMMConfig, samples: Samples) -> dict[str, int]:
    """Returns the sizes of the image side if no row has an image: nothing would train what is left of it after a cut.

    Args:
        config: config of the model to cut.
        samples: training records.
    """
    if samples.totals["slots"]:
        return {}
    # A tie may reach the language model, whose width must stay free.
    return {
        axis: units
        for axis, units in sizes(config).items()
        if all(on_image_side(one) for one in complete(config, {axis: units}))
    }


def longest_request(samples: Samples) -> tuple[RequestSize, Arrays]:
    """Returns the size and the prompt of the longest request in some data.

    Args:
        samples: encoded records.
    """
    index = samples.rows.index
    row = int(index.prompt.argmax())
    return RequestSize(int(index.prompt[row]), longest_answer(samples), int(index.slots[row])), request_of(samples, row)


def check_budget(goal: Goal) -> None:
    """Checks a number of parameters before anything is measured.

    Args:
        goal: the goal.

    Raises:
        AntgmmError: the model cannot be read, no legal model is within the budget, or the teacher itself is.
    """
    config = whole(goal.model).config
    if not goal.latency_ms:
        by_parameters(config, _parameters(goal, config), partial(pruning.search, config, multiple=goal.multiple))


def _parameters(goal: Goal, config: LMMConfig) -> int:
    return goal.params or int(total_parameters(config) / goal.smaller)


def value_of(config: LMMConfig) -> Callable[[LMMConfig], float]:
    """Returns the cost that a student should save: its share of the teacher's parameters, and some of its sublayers.

    At batch 1, latency depends on the number of sublayers more than on parameters, which depth hardly has.

    Args:
        config: config of the teacher.
    """

    def sublayers(model: LMMConfig) -> float:
        return sum(sum(towers.values()) for towers in pruning.cost(model, 1, *REQUEST).sublayers.values())

    parameters, steps = total_parameters(config), sublayers(config)
    return lru_cache(maxsize=None)(
        lambda model: total_parameters(model) / parameters + DEPTH * sublayers(model) / steps
    )


def _sensitivity(model: Student, samples: Samples, seed: int, dtype: str, seconds: float) -> Sensitivity:
    config, end = model.config, time.monotonic() + seconds
    rows, left = _rows(config, samples, dtype), reduced(config)
    count = BATCH * batches_for(samples.totals["answer"] / len(samples)) // rows
    count = max(1, min(count, len(samples) // rows))
    # The time may end it earlier.
    with bar("sensitivity of the loss to each axis", count * (1 + len(left))) as update:
        params = model.load(dtype)
        batches = calibration_batches(samples, batch_size=rows, batches=count, seed=seed)
        scored = InTime(batches, PASS * (end - time.monotonic()))
        scores, _ = importance_on(scored, config, params, methods(sizes(config)), {}, seed=seed, dtype=dtype)
        evaluated = InTime(batches, end - time.monotonic())
        gates = closed(config, scores, left)
        grown = increases(config, params, gates, evaluated, dtype=dtype, progress=lambda done: update(done, ""))
    return Sensitivity(grown, left, rows * min(scored.read, evaluated.read), rows * count)


def _rows(config: LMMConfig, samples: Samples, dtype: str) -> int:
    """Rows of a batch for sensitivity, if they fit; block influence keeps the states of all layers."""
    states = saved_bytes(config, **samples.lengths, itemsize=jnp.dtype(dtype).itemsize, remat="full")
    most = min(padded_batch_size(BATCH), len(samples))
    return rows_that_fit(config, most, **samples.lengths, dtype=dtype, states=states)


def batches_for(answer: float) -> int:
    """Returns the number of batches of `BATCH` rows for sensitivity with enough time.

    Args:
        answer: mean number of answer tokens of a row; conversations have many.
    """
    return max(FEWEST, min(MOST, ceil(MEASURED / (BATCH * answer))))


def methods(axes: Mapping[str, int]) -> dict[str, str]:
    """Returns the importance method of each axis: block influence for layers, else activations."""
    return {axis: "block_influence" if axis.endswith("/layers") else "activation" for axis in axes}


def by_side(config: LMMConfig, wanted: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Splits target sizes into those of the image side and of the language model.

    Args:
        config: model config.
        wanted: axis -> units, legal together.

    Returns:
        Sizes to cut on the image side first, and then in the language model, without axes that keep their size. All are
        in the second if the first are not legal alone.
    """
    smaller = {axis: n for axis, n in wanted.items() if n < sizes(config)[axis]}

    def of_images(axis: str) -> bool:
        return all(on_image_side(one) for one in complete(config, {axis: smaller[axis]}))

    image = {axis: n for axis, n in smaller.items() if of_images(axis)}
    if illegal_reason(config, image):
        return {}, smaller
    return image, {axis: n for axis, n in smaller.items() if axis not in image}
