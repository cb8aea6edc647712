"""A run that kills itself, with SIGKILL or SIGTERM."""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import antgmm_jax.io.convert
import antgmm_jax.io.folders
import distill.build
from antgmm_jax.io import checkpoint
from antgmm_jax.parallel import preemption
from experiments.report import write
from experiments.report.write import finish
from experiments.run import pipeline, stage
from experiments.run.export import export_gate
from experiments.run.host.meshes import devices
from experiments.run.pipeline import Run
from experiments.run.schema.recipe import load_any
from tests.experiments.quick import time_few_requests


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def with_each_batch(act: Callable[[stage.StageRun, int], None]) -> Callable[..., Any]:
    """A `StageRun._train` that calls `act(stage, batches drawn)` before it trains on each batch."""
    train = stage.StageRun._train

    def watched(self, *arguments):
        data = self.data

        def batches():
            for batch in data:
                act(self, data.position["next_index"])
                yield batch

        self.data = batches()
        try:
            return train(self, *arguments)
        finally:
            self.data = data

    return watched


def at_step(name: str, number: int) -> None:
    """Kills the process before step `number` of the named stage, once the last checkpoint is on disk."""

    def act(run: stage.StageRun, drawn: int) -> None:
        if run.stage.name == name and drawn > number:
            # Another process may still be writing its part.
            while checkpoint.latest_step(run.working) != number // 2 * 2:
                time.sleep(0.01)
            die()

    stage.StageRun._train = with_each_batch(act)


def preempted_at_step(number: int) -> None:
    """Sends SIGTERM to this process before step `number`, and slows down later steps, as real ones take longer."""

    def act(run: stage.StageRun, drawn: int) -> None:
        if drawn == number + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2 if drawn > number else 0)

    stage.StageRun._train = with_each_batch(act)


def at_publication(number: int) -> None:
    """Kills the process between writing and publishing checkpoint `number`."""
    publish, count = antgmm_jax.io.folders.publish, iter(range(1, 10**6))

    def dying(*args):
        if next(count) == number:
            die()
        publish(*args)

    antgmm_jax.io.folders.publish = dying


def at_export() -> None:
    """Kills the process between writing the weights and the config of the export."""
    antgmm_jax.io.convert._write_config = die


def in_place_of(module: Any, name: str) -> None:
    """Kills the process instead of calling a function."""
    setattr(module, name, die)


MOMENTS = {
    "cache": lambda: in_place_of(distill.build, "_records"),
    "importance": lambda: in_place_of(stage, "importance"),
    "start": lambda: in_place_of(stage, "init_state"),
    "scores": lambda: in_place_of(pipeline, "scored"),
    "gate": lambda: in_place_of(export_gate, "check"),
    "report": lambda: in_place_of(write, "latencies"),
    "mask": lambda: at_step("blocks", 3),
    "recover": lambda: at_step("blocks", 6),
    "save": lambda: at_publication(2),
    "second mask": lambda: at_step("widths", 3),
    "second segment": lambda: at_step("widths", 6),
    "export": at_export,
    "preempted": lambda: preempted_at_step(1),
    "never": lambda: None,
}


def main(*words: str) -> None:
    """Runs a recipe with a kill at one of `MOMENTS`.

    Args:
        words: recipe, folder of the run, moment and, optionally, arguments of `experiments.run.host.meshes.devices`.
    """
    recipe, run, moment, mesh, coordinator, processes, process = [*words, "", "", "1", "0"][:7]
    MOMENTS[moment]()
    time_few_requests(setattr)
    try:
        with devices(mesh, coordinator, int(processes), int(process)):
            finish(Run(load_any(recipe), run))
    except preemption.Preempted:
        sys.exit(preemption.EXIT_CODE)
