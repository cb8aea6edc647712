"""What a run reports about its steps: metrics with speed and memory, and a profile of some steps."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from antgmm_jax.blocks.tokens import IGNORE
from antgmm_jax.config import LMMConfig
from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.processes import run_on_first
from distill import Progress
from experiments.run.host.console import say
from experiments.run.host.logs import Log, open_logs
from experiments.run.host.resources import memory
from experiments.run.host.tracing import Step, Trace
from experiments.run.progress.flops import pass_flops, step_flops
from experiments.run.progress.pace import Pace
from experiments.run.schema import Recipe, Training, Work


class Watch(NamedTuple):
    """What to report about the steps of a run.

    Attributes:
        logs: names of logs, see `experiments.run.host.logs`.
        profile: steps to profile, of the first stage that takes the first of them.
        peak: peak rate of a device in FLOP/s, for the utilisation; 0 if unknown.
    """

    logs: Sequence[str] = ()
    profile: range = range(0)
    peak: float = 0.0


NOTHING = Watch()


class Watcher:
    """Reports the steps of all stages.

    Args:
        watch: what to report.
        logs: open logs.
        run: folder of the run.
        recipe: recipe of the run.
        forecast: title of each part of the run -> expected seconds.
    """

    def __init__(
        self,
        watch: Watch,
        logs: Sequence[Log],
        run: Path,
        recipe: Recipe | Training,
        forecast: Mapping[str, float],
    ):
        self.watch, self.logs, self.run, self.recipe, self.forecast = watch, logs, run, recipe, forecast
        self.trace = Trace(watch.profile, run / "profile")

    def stage(self, work: Work, teacher: LMMConfig | None) -> "StageWatcher":
        """Returns the reporter of a stage.

        Args:
            work: the stage.
            teacher: config of the teacher; None without one.
        """
        table = self.recipe.teacher if isinstance(self.recipe, Recipe) else None
        online = table is not None and table.mode == "online" and work.stage.loss.reads_teacher
        return StageWatcher(self, work, teacher if online else None)


@contextmanager
def watching(
    watch: Watch, run: Path, recipe: Recipe | Training, forecast: Mapping[str, float] | None = None
) -> Iterator[Watcher]:
    """Opens the logs of a run in its first process; all processes must call it.

    Args:
        watch: what to report.
        run: folder of the run.
        recipe: recipe of the run.
        forecast: title of each part of the run -> expected seconds; None for no forecast.

    Yields:
        The reporter.

    Raises:
        AntgmmError: a log cannot be opened; every process raises it.
    """
    with ExitStack() as stack:
        opened = open_logs(watch.logs, run, recipe.model_dump(mode="json"))
        logs = run_on_first(lambda: stack.enter_context(opened))
        watcher = Watcher(watch, logs or [], run, recipe, forecast or {})
        try:
            yield watcher
        finally:
            watcher.trace.close()


class _Mark(NamedTuple):
    """A moment of training: seconds, steps and tokens since a common start."""

    time: float
    step: int
    tokens: int


class StageWatcher:
    """Reports the steps of a stage.

    Args:
        watcher: reporter of the run.
        work: the stage.
        teacher: config of a teacher that runs in its steps; None without one.
    """

    def __init__(self, watcher: Watcher, work: Work, teacher: LMMConfig | None):
        self._watcher, self._work, self._teacher = watcher, work, teacher
        self._earlier = sum(one.stage.steps for one in watcher.recipe.work if one.number < work.number)
        self._name = f"{work.number:02d}-{work.stage.name}"
        self._lengths, self._features, self._tokens = (0, 0), False, 0
        self._since: _Mark | None = None
        self._pace = Pace(work, watcher.forecast)

    def batches(self, data: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Yields batches, and counts their tokens if there are logs."""
        for batch in data:
            if self._watcher.logs and "input_ids" in batch:
                self._count(batch)
            yield batch

    def _count(self, batch: Mapping[str, Any]) -> None:
        decoder = "decoder_input_ids" in batch
        answers = batch["targets"] != IGNORE if decoder else np.zeros((1, 0), bool)
        self._lengths, self._features = (batch["input_ids"].shape[1], answers.shape[1]), "vision_features" in batch
        tokens = np.count_nonzero(batch["attention_mask"]) + np.count_nonzero(answers)
        # Other processes have as many tokens in each row.
        self._tokens += int(tokens) * self._work.stage.optimizer.batch_size // len(batch["input_ids"])

    def step(self, step: Step, number: int) -> Step:
        """Returns a train step that is traced if the profile demands it.

        Args:
            step: the train step.
            number: number of its first call.
        """
        self._since = None  # compilation is not part of the speed
        return self._watcher.trace.around(step, number)

    def report(self, progress: Progress, config: LMMConfig) -> None:
        """Writes the metrics of a step to all logs, with the speed since the last call; warns of slow first steps.

        Args:
            progress: progress of the training loop.
            config: config of the model in training.
        """
        logs, at = self._watcher.logs, time.monotonic()
        if warning := self._pace.at(progress.step, at):
            say(warning)
        if not logs:
            return
        before, now = self._since, _Mark(at, progress.step, self._tokens)
        self._since = now
        values = {**progress.metrics, **_memory()}
        if before is not None:
            seconds = (now.time - before.time) / (now.step - before.step)
            values |= {
                "step_seconds": seconds,
                "tokens_per_second": (now.tokens - before.tokens) / (now.time - before.time),
            }
            values |= self._utilisation(config, seconds)
        for log in logs:
            log.write(self._name, progress.step, self._earlier + progress.step, values)

    def _utilisation(self, config: LMMConfig, seconds: float) -> dict[str, float]:
        """Model FLOPs utilisation, padding included: student forward and backward, online teacher forward."""
        if not self._watcher.watch.peak or not self._lengths[0]:
            return {}
        length, answer = self._lengths
        flops = step_flops(config, self._work.stage, features=self._features, length=length, answer=answer)
        if self._teacher is not None:
            parts = pass_flops(self._teacher, self._work.stage.optimizer.batch_size, length=length, answer=answer)
            flops += sum(parts.values())
        return {"mfu": flops / seconds / (self._watcher.watch.peak * sharding.devices())}


def _memory() -> dict[str, float]:
    """Memory in bytes: of the fullest device of this process, or of the process on a CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"bytes_in_use": "device_bytes", "peak_bytes_in_use": "device_peak_bytes"}
    measured = {mine: max(one.get(name, 0) for one in stats) for name, mine in names.items()}
    host = memory("VmRSS")
    return {name: float(size) for name, size in measured.items() if size} | (
        {"host_bytes": float(host)} if host else {}
    )
