"""A run that kills itself with SIGKILL: `python -m tests.experiments.killed_run RECIPE RUN MOMENT`.

Behind these may stand MESH COORDINATOR PROCESSES PROCESS, as `experiments.run.host.meshes.devices` takes them.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import antgmm_jax.io.convert
import antgmm_jax.io.folders
from antgmm_jax.io import checkpoint
from experiments.report.write import finish
from experiments.run import stage
from experiments.run.host.meshes import devices
from experiments.run.pipeline import Run
from experiments.run.schema.recipe import load_recipe
from tests.experiments.quick import time_few_requests


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def with_each_batch(act: Callable[[stage.StageRun, int], None]) -> Callable[..., Any]:
    """`StageRun._train` that calls `act` with the stage and the number of batches drawn, before each is trained on."""
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
    """Dies when the named stage asks for the batch of step `number`, with what it saved before that on disk."""

    def act(run: stage.StageRun, drawn: int) -> None:
        if run.stage.name == name and drawn > number:
            # Another process may still write its part.
            while checkpoint.latest_step(run.working) != number // 2 * 2:
                time.sleep(0.01)
            die()

    stage.StageRun._train = with_each_batch(act)


def at_publication(number: int) -> None:
    """Dies between writing a checkpoint and giving it its name, at the given one."""
    publish, count = antgmm_jax.io.folders.publish, iter(range(1, 10**6))

    def dying(*args):
        if next(count) == number:
            die()
        publish(*args)

    antgmm_jax.io.folders.publish = dying


def at_export() -> None:
    """Dies when the weights of the export are written and its config is not."""
    antgmm_jax.io.convert._write_config = die


MOMENTS = {
    "mask": lambda: at_step("blocks", 3),
    "recover": lambda: at_step("blocks", 6),
    "save": lambda: at_publication(2),
    "second mask": lambda: at_step("widths", 3),
    "second segment": lambda: at_step("widths", 6),
    "export": at_export,
    "never": lambda: None,
}

if __name__ == "__main__":
    recipe, run, moment, mesh, coordinator, processes, process = [*sys.argv[1:], "", "", "1", "0"][:7]
    MOMENTS[moment]()
    time_few_requests(setattr)
    with devices(mesh, coordinator, int(processes), int(process)):
        finish(Run(load_recipe(recipe), run))
