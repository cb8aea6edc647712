"""Distillation steps of several batch sizes: how much of the device's matmul rate each turns into needed FLOPs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import distill
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.functional import functional
from experiments.lab.bench.batches import device_arrays, first
from experiments.lab.bench.flops import step_flops, traced_flops
from experiments.lab.bench.timing import dispatched, spread
from experiments.run.host.console import say

LOSS = distill.LossConfig(hard=0.5, soft=1.0, temperature=2.0)
FULL = "RESOURCE_EXHAUSTED"


class Limits(NamedTuple):
    """What a device can do, FLOP/s.

    Attributes:
        measured: matrix products of the step's dtype, as measured.
        published: those its maker states for bfloat16; None in another dtype, or where they are not known.
    """

    measured: float
    published: float | None


class Lesson(NamedTuple):
    """Who learns from whom.

    Attributes:
        student: the model that is trained, parameters and moments in float32.
        teacher: the one it learns from.
        source: its targets.
        online: whether they are computed inside the step.
        dtype: compute dtype.
    """

    student: LMMConfig
    teacher: LMMConfig
    source: distill.Teacher
    online: bool
    dtype: Any


def sweep(
    lesson: Lesson, batch: Mapping[str, np.ndarray], sizes: Sequence[int], limits: Limits, rounds: int
) -> dict[str, Any]:
    """Times a step at each batch size until the memory is full.

    Args:
        lesson: the step.
        batch: the largest batch, from `random_batch`.
        sizes: batch sizes, rising.
        limits: of the device.
        rounds: rounds that are timed.

    Returns:
        `sizes`, the figures of each, `best`, those of the one with the largest share of the matmul rate, and `full_at`,
        the batch size that did not fit, or None.

    Raises:
        AntgmmError: not even the smallest fits, or a loss that is not finite.
    """
    found: list[dict[str, Any]] = []
    for size in sizes:
        say(f"accelerator: step with {'an online' if lesson.online else 'a cached'} teacher at batch {size}")
        try:
            found.append(_step(lesson, first(batch, size), limits, rounds))
        except jax.errors.JaxRuntimeError as error:
            if FULL not in str(error):
                raise
            if not found:
                raise AntgmmError(
                    f"the device cannot hold a step at batch {size}: give a smaller --batch, --student or --teacher"
                ) from error
            return {**_with_best(found), "full_at": size}
    return {**_with_best(found), "full_at": None}


def _with_best(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {"sizes": found, "best": max(found, key=lambda each: each["mfu"]["median"])}


def _step(lesson: Lesson, batch: Mapping[str, np.ndarray], limits: Limits, rounds: int) -> dict[str, Any]:
    pure = functional(lesson.student)
    optimizer = distill.make_optimizer(distill.OptimizerConfig(learning_rate=1e-4), steps=1000)
    step = distill.make_step(pure, optimizer, LOSS, teacher=lesson.source, dtype=lesson.dtype)
    state = [distill.init_state(pure.init(jax.random.key(1)), optimizer)]
    inputs = device_arrays(lesson.source.attach(dict(batch)))
    rate = step.schedule(state[0].step)
    traced = step.program.trace(state[0], inputs, {}, lesson.source.params, rate)
    program = traced.lower().compile()

    def take_step() -> Mapping[str, jax.Array]:
        # The state is donated: the new one takes its place.
        state[0], metrics = program(state[0], inputs, {}, lesson.source.params, rate)
        return metrics

    seconds = dispatched(take_step, rounds)
    loss = float(jax.device_get(take_step()["loss"]))
    if not np.isfinite(loss):
        raise AntgmmError(f"the loss of a step in {jnp.dtype(lesson.dtype).name} is {loss}: no time is told of it")
    needed = step_flops(lesson.student, lesson.teacher, batch, online=lesson.online)
    rows = len(batch["targets"])
    return {
        "batch": rows,
        "ms": spread(1e3 * seconds),
        "samples_per_second": spread(rows / seconds),
        "flops": {
            "needed": needed,
            "traced": traced_flops(traced.jaxpr),
            "traced_loops_once": traced_flops(traced.jaxpr, loops_once=True),
            "compiled_loops_once": _compiled_flops(program),
        },
        **shares(needed, seconds, limits),
        "program_bytes": _bytes(program),
        "loss": loss,
    }


def shares(flops: float, seconds: np.ndarray, limits: Limits) -> dict[str, Any]:
    """The share of a device's rate that work of so many needed FLOPs takes: model FLOPs utilization, MFU.

    Source: PaLM, arXiv 2204.02311, appendix B; against the measured matmul rate in the place of the published one.

    Args:
        flops: that the mathematics needs.
        seconds: [rounds].
        limits: of the device.

    Returns:
        `mfu` of the measured rate, and `mfu_published`, None where no peak is published.
    """
    rate = flops / seconds
    published = None if limits.published is None else spread(rate / limits.published)
    return {"mfu": spread(rate / limits.measured), "mfu_published": published}


def _compiled_flops(program: Any) -> float | None:
    """What the compiler counts, the body of each loop once, norms and activations included; None where it does not."""
    analysis = program.cost_analysis()
    return None if analysis is None else analysis.get("flops")


def _bytes(program: Any) -> int | None:
    """Arguments, results and temporaries of a program together; None where the compiler does not tell."""
    found = program.memory_analysis()
    if found is None:
        return None
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return kept + found.temp_size_in_bytes
