"""Benchmark of distillation steps at several batch sizes, relative to the matmul rate of the device."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import distill
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.pure import functional
from experiments.lab.bench.batches import device_arrays, first
from experiments.lab.bench.flops import step_flops, traced_flops
from experiments.lab.bench.timing import dispatched, spread
from experiments.run.host.console import say

LOSS = distill.LossConfig(hard=0.5, soft=1.0, temperature=2.0)
FULL = "RESOURCE_EXHAUSTED"


class Limits(NamedTuple):
    """Matmul rates of a device in FLOP/s.

    Attributes:
        measured: measured rate in the dtype of the step.
        published: published rate for bfloat16; None for another dtype, or if unknown.
    """

    measured: float
    published: float | None


class Lesson(NamedTuple):
    """Student and teacher of a distillation step.

    Attributes:
        student: config of the student; parameters and moments are float32.
        teacher: config of the teacher.
        source: source of the targets.
        online: whether the teacher runs inside the step.
        dtype: dtype of computation.
    """

    student: LMMConfig
    teacher: LMMConfig
    source: distill.Teacher
    online: bool
    dtype: Any


def sweep(
    lesson: Lesson, batch: Mapping[str, np.ndarray], sizes: Sequence[int], limits: Limits, rounds: int
) -> dict[str, Any]:
    """Measures the step at each batch size until the memory is full.

    Args:
        lesson: student and teacher.
        batch: the largest batch, from `random_batch`.
        sizes: batch sizes, ascending.
        limits: matmul rates of the device.
        rounds: measured rounds.

    Returns:
        `sizes` (figures of each batch size), `best` (figures of the batch size with the highest rate), and `full_at`,
        the batch size that did not fit, or None.

    Raises:
        AntgmmError: the smallest batch does not fit, or a loss is not finite.
    """
    results: list[dict[str, Any]] = []
    for size in sizes:
        say(f"accelerator: step with {'an online' if lesson.online else 'a cached'} teacher at batch {size}")
        try:
            results.append(_step(lesson, first(batch, size), limits, rounds))
        except jax.errors.JaxRuntimeError as error:
            if FULL not in str(error):
                raise
            if not results:
                raise AntgmmError(
                    f"the memory is too small for a step at batch {size}: use a smaller --batch, --student or --teacher"
                ) from error
            return {**_with_best(results), "full_at": size}
    return {**_with_best(results), "full_at": None}


def _with_best(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {"sizes": results, "best": max(results, key=lambda each: each["mfu"]["median"])}


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
        # The step donates its state.
        state[0], metrics = program(state[0], inputs, {}, lesson.source.params, rate)
        return metrics

    seconds = dispatched(take_step, rounds)
    loss = float(jax.device_get(take_step()["loss"]))
    if not np.isfinite(loss):
        raise AntgmmError(f"the loss of a step in {jnp.dtype(lesson.dtype).name} is {loss}: use another --dtype")
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
    """Computes the model FLOPs utilization (MFU; PaLM, arXiv 2204.02311, appendix B).

    Args:
        flops: necessary FLOPs.
        seconds: measured times [rounds].
        limits: matmul rates of the device.

    Returns:
        `mfu` relative to the measured matmul rate, and `mfu_published` relative to the published one, or None.
    """
    rate = flops / seconds
    published = None if limits.published is None else spread(rate / limits.published)
    return {"mfu": spread(rate / limits.measured), "mfu_published": published}


def _compiled_flops(program: Any) -> float | None:
    """FLOPs by the compiler's cost analysis (loop bodies once, with norms and activations); None if unknown."""
    analysis = program.cost_analysis()
    return None if analysis is None else analysis.get("flops")


def _bytes(program: Any) -> int | None:
    """Bytes of arguments, results and temporaries of a program; None if unknown."""
    analysis = program.memory_analysis()
    if analysis is None:
        return None
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return kept + analysis.temp_size_in_bytes
