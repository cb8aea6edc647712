"""Benchmark of stalls in training: how long the loop waits for data and checkpoints."""

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
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.io.placed import on_devices
from antgmm_jax.parallel.sharding import shard_rows
from antgmm_jax.pure import functional
from distill.step import Step
from experiments.lab.bench.timing import format_spread, spread
from experiments.run.host.console import bar, table
from experiments.run.host.facts import machine
from experiments.run.rows.datasets import encoded, load_records
from experiments.run.schema import Recipe
from experiments.run.stepper import HISTORY_EVERY, Stepper

SIDES = {
    "resident": "one batch that stays on the device",
    "data": "prefetched batches, teacher cache in memory",
    "disk": "prefetched batches, teacher cache on disk",
    "checkpoints": "like the second, with a checkpoint",
}


class _Clock:
    """Measures the seconds that calls take while the device is idle.

    Args:
        idle_since: returns the time since which the device is idle; infinity while it is busy.
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
    """A train step that records when its last call was completed on the device.

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
    """The training loop of a recipe's last stage, starting from the teacher."""

    def __init__(self, recipe: Recipe, folder: Path):
        stage = recipe.stages[-1]
        if others := [term for term in ("hidden", "vision", "bridge") if getattr(stage.loss, term)]:
            changes = " ".join(f"--set stage.{stage.name}.loss.{term}=0" for term in others)
            raise AntgmmError(
                f"stalls supports only losses on answers, but stage {stage.name!r} has others: add {changes}"
            )
        config, params = load_hf(recipe.teacher.path)
        pure, params = functional(config, stage.optimizer.remat), on_devices(config, params, "float32")
        samples = encoded(recipe, load_records(recipe.data), load_processor(recipe.teacher.path), config)
        if len([*samples.needs.alike()]) > 1:  # batches of several widths, unlike the resident one
            raise AntgmmError("stalls needs rows with similar numbers of image slots: choose data with equal pictures")
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
        opened = {
            in_memory: distill.open_cache(folder / "cache", key="stalls", in_memory=in_memory)
            for in_memory in (True, False)
        }
        self._teachers = {in_memory: distill.cached(pure, params, cache) for in_memory, cache in opened.items()}
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
        self._resident = shard_rows({name: value for name, value in first.items() if name != "index"})

    def __call__(self, side: str, steps: int) -> dict[str, float]:
        """Takes some steps; returns seconds in total (`all`), waiting for `data`, and to `save`.

        `written` is the time from the last step until the checkpoint is on disk.
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
        seconds = {"all": end - begin, "data": data.seconds, "save": saving.seconds}
        return {**seconds, "written": time.perf_counter() - end}


def run(recipe: Recipe, *, rounds: int, steps: int) -> dict[str, Any]:
    """Measures the training loop with and without data loading and checkpoints, alternating between them.

    Args:
        recipe: the benchmark uses loss, optimizer and batch size of its last stage, and the teacher.
        rounds: measured rounds.
        steps: steps of each variant per round, followed by one checkpoint.

    Returns:
        Figures as JSON types: for each of `SIDES` the milliseconds per step, the `ratio` to the resident batch, and
        the fraction of time in which the device was idle waiting for `data`; for a checkpoint the milliseconds for
        which it blocked the loop (`held_ms`) and until it was on disk (`written_ms`), and the `share` of time with a
        checkpoint `every` so many steps; `machine`.

    Raises:
        AntgmmError: invalid input.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(recipe, Path(folder))
        for side in SIDES:  # compiles, and warms up the disk
            bench(side, 2)
        with bar("stalls", rounds * len(SIDES)) as update:
            results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for turn in range(rounds):
                for number, side in enumerate(SIDES, 1):
                    results[side].append(bench(side, steps))
                    update(turn * len(SIDES) + number, "")
    seconds = {side: {key: np.array([x[key] for x in each]) for key in each[0]} for side, each in results.items()}
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
    """Formats the figures as texts and a table.

    Args:
        figures: result of `run`.

    Returns:
        Texts and a table.
    """
    lines = [
        (
            SIDES[side],
            format_spread(result["step_ms"], ".1f"),
            format_spread(result["ratio"], ".3f"),
            format_spread(result["data"], ".2%"),
        )
        for side, result in figures["sides"].items()
    ]
    head = ["loop", "ms per step", "/ resident", "waiting for data"]
    host, saved = figures["machine"], figures["checkpoint"]
    return [
        f"{host['cpu']}, {host['cores']} cores, {host['device']}, load {host['load']}",
        table(head, lines, f"{figures['rounds']} rounds of {figures['steps']} steps, medians (quartiles)"),
        f"a checkpoint blocks the loop for {format_spread(saved['held_ms'], '.1f')} ms, and is on disk"
        f" {format_spread(saved['written_ms'], '.0f')} ms later; one every {saved['every']} steps:"
        f" {format_spread(saved['share'], '.2%')} of the time",
    ]
