"""What a training step waits for: how long data and checkpoints hold the loop up, against a loop without either."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import jax
import numpy as np

import distill
from antgmm_jax.convert import load_hf
from antgmm_jax.errors import AntgmmError
from antgmm_jax.functional import float32, functional
from antgmm_jax.sharding import rows
from distill.step import Step
from experiments.lab.bench.timing import spread, told
from experiments.run.datasets import encoded, load_records
from experiments.run.host.console import bar, table
from experiments.run.host.facts import machine
from experiments.run.samples import load_processor
from experiments.run.schema import Recipe
from experiments.run.stepper import HISTORY_EVERY, Stepper

SIDES = {
    "resident": "one batch that stays on the device",
    "data": "batches made ahead, teacher's rows in memory",
    "disk": "batches made ahead, teacher's rows from the disk",
    "checkpoints": "as the second, and a checkpoint",
}


class _Clock:
    """Counts the seconds that calls take while a device has nothing to do.

    Args:
        idle_since: when the device ended its work; infinite while it is at work.
    """

    def __init__(self, idle_since: Callable[[], float] = lambda: 0.0) -> None:
        self.seconds, self._idle_since = 0.0, idle_since

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.seconds += max(0.0, time.perf_counter() - max(begin, self._idle_since()))

        return timed

    def over(self, batches: Iterator[Any]) -> Iterator[Any]:
        take = self.around(lambda: next(batches))
        while True:
            yield take()


class _Watched:
    """A step, and when the newest one that was begun was done.

    Args:
        step: the step.
    """

    def __init__(self, step: Step):
        self._step, self._watcher = step, ThreadPoolExecutor(1)
        self._done: Future[float] | None = None

    def __call__(self, *arguments: Any) -> Any:
        state, metrics = self._step(*arguments)
        self._done = self._watcher.submit(_when_done, metrics["loss"])
        return state, metrics

    def idle_since(self) -> float:
        if self._done is None:
            return 0.0
        return self._done.result() if self._done.done() else float("inf")


def _when_done(array: jax.Array) -> float:
    array.block_until_ready()
    return time.perf_counter()


class _Bench:
    """The loop of a recipe's last stage, started from its teacher, with a cache and checkpoints in a folder."""

    def __init__(self, recipe: Recipe, folder: Path):
        stage = recipe.stages[-1]
        if others := [term for term in ("hidden", "vision", "bridge") if getattr(stage.loss, term)]:
            changes = " ".join(f"--set stage.{stage.name}.loss.{term}=0" for term in others)
            raise AntgmmError(
                f"stalls reads the teacher's last states, stage {stage.name!r} others too: give {changes}"
            )
        config, params = load_hf(recipe.teacher.path)
        pure, params = functional(config, stage.optimizer.remat), float32(config, params)
        # Of one width, as what is scored: the resident batch has only one.
        samples = encoded(recipe, load_records(recipe.data), load_processor(recipe.teacher.path), config)
        like = next(samples.in_order(stage.optimizer.batch_size))
        with bar("teacher cache", len(samples)) as update:
            distill.build_cache(
                pure,
                params,
                samples.in_order(stage.optimizer.batch_size),
                folder / "cache",
                samples=len(samples),
                like=like,
                key="stalls",
                progress=lambda done, _: update(done, ""),
            )
        opened = {held: distill.open_cache(folder / "cache", key="stalls", in_memory=held) for held in (True, False)}
        self._teachers = {held: distill.cached(pure, params, cache) for held, cache in opened.items()}
        optimizer = distill.make_optimizer(stage.optimizer, stage.steps)
        self._step = _Watched(
            distill.make_step(
                pure,
                optimizer,
                stage.loss,
                teacher=self._teachers[True],
                micro_batches=stage.optimizer.accumulate,
                dtype=jax.numpy.dtype(stage.optimizer.dtype),
            )
        )
        self.state = distill.init_state(params, optimizer)
        self._data = samples.shuffled(stage.optimizer.batch_size, recipe.seed)
        self._stepper = Stepper(folder / "steps", self._data)
        first = self._teachers[True].attach(next(self._data))
        self._resident = rows({name: value for name, value in first.items() if name != "index"})

    def __call__(self, side: str, steps: int) -> dict[str, float]:
        """Takes some steps; seconds of them all, of those in which the device had to wait for data, and to save.

        `written` is how long after the last step the checkpoint, begun at the end, was on disk.
        """
        data, saving = _Clock(self._step.idle_since), _Clock()
        teacher = self._teachers[side != "disk"]
        attach = (lambda batch: batch) if side == "resident" else data.around(teacher.attach)
        last = int(self.state.step) + steps
        begin = time.perf_counter()
        self.state, _ = distill.train(
            self._step,
            self.state,
            repeat(self._resident) if side == "resident" else data.over(self._data),
            steps=last,
            teacher=teacher._replace(attach=attach),
            save=saving.around(lambda state: self._stepper.save(state, {})),
            save_every=last if side == "checkpoints" else 0,
            report_every=HISTORY_EVERY,
        )
        end = time.perf_counter()
        self._stepper.finish()
        found = {"all": end - begin, "data": data.seconds, "save": saving.seconds}
        return {**found, "written": time.perf_counter() - end}


def run(recipe: Recipe, *, rounds: int, steps: int) -> dict[str, Any]:
    """Measures the loop with and without what may hold it up, in turn.

    Args:
        recipe: the last stage's loss, optimizer and batch size are used, and the teacher's shape.
        rounds: rounds that are timed.
        steps: steps of each side in a round, with one checkpoint after them.

    Returns:
        Figures as JSON types: for each of `SIDES` milliseconds a `step`, its `ratio` to the resident batch's, and the
        share of the loop's time in which the device was idle and waited for `data`; of a checkpoint the milliseconds
        that it `held` the loop, that it was yet being `written` after the loop, and the `share` of time with one every
        `every` steps, as the recipe says; `machine`.

    Raises:
        AntgmmError: bad input.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(recipe, Path(folder))
        for side in SIDES:  # compiles, and writes once
            bench(side, 2)
        with bar("stalls", rounds * len(SIDES)) as update:
            found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for turn in range(rounds):
                for number, side in enumerate(SIDES, 1):
                    found[side].append(bench(side, steps))
                    update(turn * len(SIDES) + number, "")
    seconds = {side: {key: np.array([x[key] for x in each]) for key in each[0]} for side, each in found.items()}
    each = {
        side: {
            "step_ms": spread(1e3 * (s["all"] - s["save"]) / steps),
            "ratio": spread((s["all"] - s["save"]) / seconds["resident"]["all"]),
            "data": spread(s["data"] / s["all"]),
        }
        for side, s in seconds.items()
    }
    saved, every = seconds["checkpoints"], recipe.checkpoint_every
    between = every * seconds["data"]["all"] / steps
    checkpoint = {
        "every": every,
        "held_ms": spread(1e3 * saved["save"]),
        "written_ms": spread(1e3 * saved["written"]),
        "share": spread(saved["save"] / (saved["save"] + between)),
    }
    return {"sides": each, "checkpoint": checkpoint, "rounds": rounds, "steps": steps, "machine": machine()}


def shown(figures: Mapping[str, Any]) -> list[Any]:
    """The figures for people.

    Args:
        figures: what `run` gave.

    Returns:
        Text and a table.
    """
    lines = [
        (SIDES[side], told(found["step_ms"], ".1f"), told(found["ratio"], ".3f"), told(found["data"], ".2%"))
        for side, found in figures["sides"].items()
    ]
    head = ["loop", "ms a step", "/ resident", "idle for data"]
    about, saved = figures["machine"], figures["checkpoint"]
    return [
        f"{about['cpu']}, {about['cores']} cores, {about['device']}, load {about['load']}",
        table(head, lines, f"{figures['rounds']} rounds of {figures['steps']} steps, medians (quartiles)"),
        f"a checkpoint holds the loop for {told(saved['held_ms'], '.1f')} ms, and is on disk"
        f" {told(saved['written_ms'], '.0f')} ms later; one every {saved['every']} steps:"
        f" {told(saved['share'], '.2%')} of the time",
    ]
