"""The training loop: deterministic and resumable; it stops at the first loss that is not finite."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel import preemption
from antgmm_jax.parallel.sharding import shard_rows
from antgmm_jax.pure import Params
from distill.state import State
from distill.step import Batch, Gates, Metrics
from distill.teacher import NO_TEACHER, Teacher

HOST_ONLY = ("id", "index", "slots")


class Diverged(AntgmmError):
    """A loss, gradient, parameter or moment is not finite."""


class Progress(NamedTuple):
    """Progress of the training loop.

    Attributes:
        step: number of steps taken.
        steps: total number of steps.
        metrics: metrics of the last step.
    """

    step: int
    steps: int
    metrics: dict[str, float]


class _Pending(NamedTuple):
    """A step that was dispatched; its metrics are not yet checked."""

    step: int
    ids: np.ndarray | None
    metrics: Mapping[str, jax.Array]


def train(
    step_fn: Callable[[State, Batch, Gates, Params], tuple[State, Metrics]],
    state: State,
    batches: Iterator[Mapping[str, Any]],
    *,
    steps: int,
    gates_at: Callable[[int], Gates] = lambda step: {},
    teacher: Teacher = NO_TEACHER,
    save: Callable[[State], str] = lambda state: "",
    save_every: int = 0,
    last_checkpoint: str = "",
    report: Callable[[Progress], None] = lambda progress: None,
    report_every: int = 10,
    names: Callable[[np.ndarray], list] = np.ndarray.tolist,
) -> tuple[State, dict[str, float]]:
    """Trains from step `state.step` up to step `steps`.

    Training can be interrupted: steps a .. b followed by b .. c give the same bits as a .. c, if the iterator continues
    where it was and the device computes the same bits twice (a GPU with `--xla_gpu_deterministic_ops`). The loop takes
    one batch per step and none ahead of a save. After SIGTERM it saves and ends with the current step (see
    `antgmm_jax.parallel.preemption`).

    Args:
        step_fn: train step from `make_step`.
        state: initial state; donated.
        batches: host batches (dicts of arrays) with the rows of this process. `id`, `index` and `slots` stay on the
            host; errors name the `id` or else the `index` of samples.
        steps: total number of steps.
        gates_at: step -> gates, always with the same names and shapes.
        teacher: teacher of `step_fn`.
        save: saves a state (checked to be finite) and returns the name of the checkpoint.
        save_every: steps between saves; 0 for none. The caller saves the returned state.
        last_checkpoint: name of the checkpoint of `state`, for error messages.
        report: called every `report_every` steps and after the last step.
        report_every: steps between reports, >= 1.
        names: converts `id` or `index` of a batch to sample names for error messages.

    Returns:
        The state after the last step, and the metrics of that step.

    Raises:
        Diverged: a loss, gradient or parameter is not finite; names the step, the samples and the last good checkpoint.
        AntgmmError: there are too few batches.
        Preempted: SIGTERM was received; the state is saved.
    """
    pending: _Pending | None = None
    metrics: dict[str, float] = {}
    first = int(state.step)
    for step in range(first, steps):
        host = next(batches, None)
        if host is None:
            raise AntgmmError(f"the data ended at step {step} of {steps}: repeat it or take fewer steps")
        inputs = shard_rows({name: x for name, x in teacher.attach(dict(host)).items() if name not in HOST_ONLY})
        state, fresh = step_fn(state, inputs, gates_at(step), teacher.params)
        # Check the previous step while this one runs, so that the device never waits for the host.
        if pending is not None:
            metrics = _checked(pending, last_checkpoint, names)
        pending = _Pending(step, _ids(host), fresh)
        done, leaving = step + 1, preemption.requested()
        saving = leaving or (save_every and done % save_every == 0)
        if saving or done == steps or done % report_every == 0 or step == first:
            metrics, pending = _checked(pending, last_checkpoint, names), None
            report(Progress(done, steps, metrics))
        if saving or done == steps:
            _check_state(state, step, lambda host=host: _named(_ids(host), names), last_checkpoint)
        if saving:
            last_checkpoint = save(state)
        if leaving:
            raise preemption.Preempted
    return state, metrics


def _ids(host: Mapping[str, Any]) -> np.ndarray | None:
    name = next((name for name in ("id", "index") if name in host), None)
    return None if name is None else np.asarray(host[name])


def _named(ids: np.ndarray | None, names: Callable[[np.ndarray], list]) -> list:
    return [] if ids is None else names(ids)


def _checked(pending: _Pending, checkpoint: str, names: Callable[[np.ndarray], list]) -> dict[str, float]:
    """Fetches the metrics of a step; raises AntgmmError if one is not finite."""
    metrics = {name: float(value) for name, value in jax.device_get(dict(pending.metrics)).items()}
    bad = [
        f"{name} = {metrics[name]}"
        for name in sorted(metrics, key=lambda n: (n != "loss", n))
        if not np.isfinite(metrics[name])
    ]
    if bad:
        raise _stop(", ".join(bad), pending.step, _named(pending.ids, names), checkpoint)
    return metrics


def _check_state(state: State, step: int, ids: Callable[[], list], checkpoint: str) -> None:
    if not bool(_all_finite((state.params, state.opt_state))):
        raise _stop("a parameter or optimizer moment is not finite", step, ids(), checkpoint)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _stop(what: str, step: int, ids: list, checkpoint: str) -> Diverged:
    return Diverged(
        f"training stopped at step {step}: {what}; batch ids {ids}; last good checkpoint: {checkpoint or 'none'}; "
        "check these samples, or lower the learning rate"
    )
