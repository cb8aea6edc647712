"""This toolkit as a contender, with an online teacher or with a teacher cache."""

import math
import shutil
import time
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import distill
from antgmm_jax.io.convert import load_hf, open_hf
from antgmm_jax.io.placed import on_devices
from antgmm_jax.parallel.sharding import shard_rows
from antgmm_jax.pure import functional
from data.batching import Batches, sequential_batches
from data.record import Arrays
from distill.step import Step
from experiments.lab.peers.preparation import batch_of, narrow, stream
from experiments.lab.peers.record import SIDE, Recorder
from experiments.lab.peers.task import EPOCHS, Task, Text, read
from experiments.run.host.allocator import keep_freed_memory

LOSS = distill.LossConfig(hard=0.0, soft=1.0, temperature=1.0, direction="forward")


def main(work: Path, out: Path, mode: str) -> None:
    """Runs the contender.

    Args:
        work: folder of the task, also for the `cache`.
        out: JSON file to write.
        mode: "online" for one epoch, "build" to build the cache, or "cached" for `EPOCHS` epochs with the cache.
    """
    record = Recorder("jax", "flax")
    keep_freed_memory()  # as `antgmm` does
    task, text = read(work)
    if mode == "build":
        build(task, text, work, record)
    elif mode == "cached":
        train(task, text, work, record, from_cache(work), EPOCHS * task.steps)
    else:
        config, params = load_hf(work / "ours" / "teacher")
        train(
            task,
            text,
            work,
            record,
            distill.online(functional(config), on_devices(config, params, "float32")),
            task.steps,
        )
    matrix, product = jnp.ones((SIDE, SIDE), jnp.float32), jax.jit(jnp.dot)
    record.write(out, lambda: product(matrix, matrix).block_until_ready(), task.batch)


def build(task: Task, text: Text, work: Path, record: Recorder) -> None:
    """Builds the cache, and records `build_seconds` (without loading the model) and `cache_bytes`."""
    config, params = load_hf(work / "ours" / "teacher")
    params, place = on_devices(config, params, "float32"), work / "cache"
    for left in (place, place.with_name("cache.partial")):
        shutil.rmtree(left, ignore_errors=True)
    like = batch_of(task, text, np.arange(task.batch), task.widths[-1])
    began = time.perf_counter()
    key = distill.fingerprint(params, "peers")
    order = np.argsort(text.lengths, kind="stable")
    short_first = (narrow(task, text, rows) for rows in sequential_batches(order, task.batch))
    distill.build_cache(functional(config), params, short_first, place, samples=task.rows, like=like, key=key)
    seconds = time.perf_counter() - began
    (work / "cache.key").write_text(key)
    files = (path.stat().st_size for path in place.rglob("*") if path.is_file())
    record.note(build_seconds=seconds, cache_bytes=sum(files))


def from_cache(work: Path) -> distill.Teacher:
    """Opens the teacher cache of an earlier process; it reads only the weights of the head."""
    config, params = open_hf(work / "ours" / "teacher")
    cache = distill.open_cache(work / "cache", key=(work / "cache.key").read_text(), in_memory=True)
    return distill.cached(functional(config), params, cache)


def train(task: Task, text: Text, work: Path, record: Recorder, teacher: distill.Teacher, steps: int) -> None:
    """Compiles and warms up every program, then trains the student and records each step."""
    config, start = load_hf(work / "ours" / "student")
    optimizer = make_optimizer(task, steps)
    step = distill.make_step(functional(config), optimizer, LOSS, teacher=teacher)
    warm(step, distill.init_state(on_devices(config, start, "float32"), optimizer), stream(task, text), steps, teacher)
    state = jax.block_until_ready(distill.init_state(on_devices(config, start, "float32"), optimizer))
    record.ready()
    distill.train(
        step,
        state,
        stream(task, text),
        steps=steps,
        teacher=teacher,
        report=lambda progress: record.step(progress.metrics["loss"]),
        report_every=1,
    )


def make_optimizer(task: Task, steps: int) -> distill.Optimizer:
    """Returns AdamW at a constant rate without clipping, like the peers; the unused image side is frozen."""
    config = distill.OptimizerConfig(
        learning_rate=task.learning_rate, schedule="constant", weight_decay=task.weight_decay, clip=math.inf
    )
    return distill.make_optimizer(config, steps, frozen=("vision", "bridge"))


def warm(step: Step, state: distill.State, source: Batches, steps: int, teacher: distill.Teacher) -> None:
    """Takes two steps at each width, to compile every program; the state is consumed."""
    seen: dict[int, Arrays] = {}
    for batch in islice(source, steps):
        seen.setdefault(batch["input_ids"].shape[1], batch)
    for batch in [*seen.values()] * 2:
        inputs = shard_rows({name: x for name, x in teacher.attach(batch).items() if name != "index"})
        state, metrics = step(state, inputs, {}, teacher.params)
        jax.block_until_ready(metrics)
