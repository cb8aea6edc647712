"""What makes a stage or phase resumable at any step: its checkpoints, its place in the data, its loss curves."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from antgmm_jax.io import checkpoint
from data.batching import Batches
from distill import Progress, State

HISTORY_EVERY = 10
"""Steps between two points of the loss curves."""


class Stepper:
    """The step checkpoints of a running stage or phase, each with its place in the data.

    Args:
        folder: where they lie.
        data: the batches that the steps take; sought to the right place when a state is restored.
    """

    def __init__(self, folder: Path, data: Batches):
        self._folder, self._data = folder, data
        self._step = checkpoint.latest_step(folder)
        self._saved: Callable[[], None] = lambda: None

    @property
    def last(self) -> str:
        """Name of the newest checkpoint, for errors; "" where there is none."""
        return "" if self._step is None else str(self._folder / f"{self._step:08d}")

    def record(self) -> dict[str, Any] | None:
        """What the caller saved beside the newest state; None where there is no checkpoint."""
        return None if self._step is None else checkpoint.load_step_record(self._folder, self._step)

    def restore(self, like: State) -> State:
        """The newest state; the data goes on with the batch after it.

        Args:
            like: a state of the same shapes, or their description; the new one lies on the devices where it does.

        Returns:
            The state.

        Raises:
            AntgmmError: the checkpoint is damaged, or of other shapes.
        """
        assert self._step is not None, "nothing was saved: ask record() first"
        state, record = checkpoint.load_step(self._folder, self._step, like)
        self._data.seek(record["position"])
        return state

    def save(self, state: State, record: Mapping[str, Any]) -> str:
        """Begins to save a state with its place in the data; it is written while the next steps are taken.

        Args:
            state: after its last step.
            record: what else is needed to go on, as JSON types.

        Returns:
            The checkpoint's name.

        Raises:
            AntgmmError: it, or the one before, cannot be written.
        """
        self.finish()
        step = int(state.step)
        self._saved = checkpoint.save_step(self._folder, step, state, {**record, "position": self._data.position})
        self._step = step
        return self.last

    def finish(self) -> None:
        """Waits until what was saved is on disk. Raises AntgmmError where it cannot be written."""
        saved, self._saved = self._saved, lambda: None
        saved()


def add_point(history: list[dict[str, float]], progress: Progress) -> None:
    """Adds the step's metrics to the loss curves where a point is due.

    The loop also reports the first step after a restart, and a resumed run takes some steps again: neither counts.

    Args:
        history: the points so far; changed in place.
        progress: what the loop reports.
    """
    due = progress.step % HISTORY_EVERY == 0 or progress.step == progress.steps
    if due and (not history or progress.step > history[-1]["step"]):
        history.append({"step": progress.step, **progress.metrics})
