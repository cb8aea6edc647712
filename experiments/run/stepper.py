"""Step checkpoints of a stage, with its position in the data and its loss curves."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint
from antgmm_jax.parallel.processes import broadcast_from_first, run_on_first
from data.batching import Batches
from distill import Progress, State
from experiments.run.host.allocator import return_freed_memory

HISTORY_EVERY = 10
"""Steps between points of the loss curves."""


class Stepper:
    """Saves and restores step checkpoints with their position in the data.

    Args:
        folder: folder of the checkpoints.
        data: training batches; `restore` sets their position.
        identity: digest of everything that decides the training; a step with another one is refused.
    """

    def __init__(self, folder: Path, data: Batches, identity: str = ""):
        self._folder, self._data, self._identity = folder, data, identity
        latest = run_on_first(lambda: checkpoint.latest_step(folder))
        step = int(broadcast_from_first(np.array(-1 if latest is None else latest)))
        self._step = None if step < 0 else step
        self._saved: Callable[[], None] = lambda: None

    @property
    def last(self) -> str:
        """Name of the latest checkpoint, for messages; "" if there is none."""
        return "" if self._step is None else str(self._folder / f"{self._step:08d}")

    def record(self) -> dict[str, Any] | None:
        """Returns the record of the latest checkpoint; None if there is none.

        Raises:
            AntgmmError: the checkpoint is damaged, or of another run or stage.
        """
        if self._step is None:
            return None
        record = checkpoint.load_step_record(self._folder, self._step)
        if record.get("identity") != self._identity:
            raise AntgmmError(f"{self.last} is a step of another run or stage: remove it and start again")
        return record

    def restore(self, like: State) -> State:
        """Restores the latest state and the position in the data.

        Args:
            like: a state, or its shapes, with the sharding for the restored state.

        Returns:
            The state.

        Raises:
            AntgmmError: the checkpoint is damaged or has other shapes.
        """
        assert self._step is not None, "there is no checkpoint: check record() first"
        state, record = checkpoint.load_step(self._folder, self._step, like)
        self._data.seek(record["position"])
        return state

    def save(self, state: State, record: Mapping[str, Any]) -> str:
        """Starts saving a state and the position in the data, in the background, unless its step is saved already.

        Args:
            state: the state.
            record: further data to save, as JSON types.

        Returns:
            Name of the checkpoint.

        Raises:
            AntgmmError: this or the previous checkpoint cannot be written.
        """
        self.finish()
        step = int(state.step)
        if step == self._step:
            return self.last
        more = {**record, "position": self._data.position, "identity": self._identity}
        self._saved = checkpoint.save_step(self._folder, step, state, more)
        self._step = step
        return self.last

    def finish(self) -> None:
        """Waits until the checkpoint is on disk. Raises AntgmmError if it cannot be written."""
        saved, self._saved = self._saved, lambda: None
        saved()
        # Orbax's threads leave holes in their arenas: without it, a tiny model grew by 11 kB a step from step 1 000 to
        # 3 000 with a save every 100 steps, with it by 3 kB. It takes 2 to 7 ms.
        return_freed_memory()


def add_point(history: list[dict[str, float]], progress: Progress) -> None:
    """Adds the metrics of a step to the loss curves every `HISTORY_EVERY` steps and at the end.

    Steps that a resumed run repeats are not added again.

    Args:
        history: points of the loss curves, changed in place.
        progress: progress of the training loop.
    """
    due = progress.step % HISTORY_EVERY == 0 or progress.step == progress.steps
    if due and (not history or progress.step > history[-1]["step"]):
        history.append({"step": progress.step, **progress.metrics})
