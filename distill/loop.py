"""The training loop: deterministic, resumable, and stopped by the first loss that is not finite."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel.sharding import rows
from distill.optimizer import Params, State
from distill.step import Batch, Gates, Metrics
from distill.teacher import NO_TEACHER, Teacher

HOST_ONLY = ("id", "index", "slots")


class Progress(NamedTuple):
    """What the loop tells of itself.

    Attributes:
        step: steps taken, of `steps`.
        metrics: the last step's metrics.
    """

    step: int
    steps: int
    metrics: dict[str, float]


class _Taken(NamedTuple):
    """A step that was dispatched and not yet looked at."""

    step: int
    ids: np.ndarray | None
    metrics: Mapping[str, jax.Array]


def train(
    step_fn: Callable[[State, Batch, Gates, Params], tuple[State, Metrics]],
    state: State,
    batches: Iterator[Mapping[str, np.ndarray]],
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
    """Takes steps from `state.step` to `steps`.

    Runs a .. b and b .. c give the same bits as a .. c when the iterator stands where the first run left it: it is
    advanced once a step, and not ahead of a save.

    Args:
        step_fn: from `make_step`.
        state: where to start; donated.
        batches: host batches, dicts of arrays, of this process's rows. `id`, `index` and `slots` stay on the host; an
            error names `id`, or else `index`.
        steps: number of the last step plus one.
        gates_at: step to gates, always of the same names and shapes.
        teacher: the one that `step_fn` was made with.
        save: writes a state whose numbers are known to be finite; returns the checkpoint's name.
        save_every: steps between two saves; 0 saves never. The caller saves the state that is returned.
        last_checkpoint: name of the one that `state` came from, for the error.
        report: called every `report_every` steps and after the last.
        report_every: steps between two reports, >= 1.
        names: what an error calls the samples that a batch's `id` or `index` stands for.

    Returns:
        The state after the last step and that step's metrics.

    Raises:
        AntgmmError: a loss, gradient or parameter that is not finite: names the step, the batch's samples and the last
            good checkpoint; or the batches ran out.
    """
    pending: _Taken | None = None
    metrics: dict[str, float] = {}
    first = int(state.step)
    for step in range(first, steps):
        host = next(batches, None)
        if host is None:
            raise AntgmmError(f"the data ended at step {step} of {steps}: repeat it or take fewer steps")
        inputs = rows({name: x for name, x in teacher.attach(dict(host)).items() if name not in HOST_ONLY})
        state, fresh = step_fn(state, inputs, gates_at(step), teacher.params)
        # The step before is looked at while this one runs, so that the host never holds the device up.
        if pending is not None:
            metrics = _checked(pending, last_checkpoint, names)
        pending = _Taken(step, _ids(host), fresh)
        done, saving = step + 1, save_every and (step + 1) % save_every == 0
        if saving or done == steps or done % report_every == 0 or step == first:
            metrics, pending = _checked(pending, last_checkpoint, names), None
            report(Progress(done, steps, metrics))
        if saving or done == steps:
            _check_state(state, step, lambda host=host: _named(_ids(host), names), last_checkpoint)
        if saving:
            last_checkpoint = save(state)
    return state, metrics


def _ids(host: Mapping[str, Any]) -> np.ndarray | None:
    name = next((name for name in ("id", "index") if name in host), None)
    return None if name is None else np.asarray(host[name])


def _named(ids: np.ndarray | None, names: Callable[[np.ndarray], list]) -> list:
    return [] if ids is None else names(ids)


def _checked(taken: _Taken, checkpoint: str, names: Callable[[np.ndarray], list]) -> dict[str, float]:
    """A step's metrics on the host, or the error that stops the run."""
    metrics = {name: float(value) for name, value in jax.device_get(dict(taken.metrics)).items()}
    bad = [
        f"{name} = {metrics[name]}"
        for name in sorted(metrics, key=lambda n: (n != "loss", n))
        if not np.isfinite(metrics[name])
    ]
    if bad:
        raise _stop(", ".join(bad), taken.step, _named(taken.ids, names), checkpoint)
    return metrics


def _check_state(state: State, step: int, ids: Callable[[], list], checkpoint: str) -> None:
    if not bool(_all_finite((state.params, state.opt_state))):
        raise _stop("a parameter or optimizer moment is not finite", step, ids(), checkpoint)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _stop(what: str, step: int, ids: list, checkpoint: str) -> AntgmmError:
    return AntgmmError(
        f"training stopped at step {step}: {what}; batch ids {ids}; last good checkpoint: {checkpoint or 'none'}; "
        "resume from it with a lower learning rate, or look at those samples"
    )
