"""This toolkit as a contender: its own step, cache and batches; the teacher online, or cached by a process before."""

import math
import shutil
import time
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import distill
from antgmm_jax.convert import load_hf, open_hf
from antgmm_jax.functional import float32, functional
from antgmm_jax.sharding import rows
from data.batches import Batches, visits_once
from data.record import Arrays
from distill.step import Step
from experiments.lab.peers.prepare import batch_of, narrow, stream
from experiments.lab.peers.record import SIDE, Recorder
from experiments.lab.peers.task import EPOCHS, Task, Text, read
from experiments.run.host.allocator import keep_freed_memory

LOSS = distill.LossConfig(hard=0.0, soft=1.0, temperature=1.0, direction="forward")


def main(work: Path, out: Path, mode: str) -> None:
    """Runs the contender.

    Args:
        work: the task's folder; the cache is `cache` in it.
        out: JSON file to write.
        mode: "online", one epoch; "build", which makes the cache; or "cached", `EPOCHS` epochs from the cache.
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
        train(task, text, work, record, distill.online(functional(config), float32(config, params)), task.steps)
    matrix, product = jnp.ones((SIDE, SIDE), jnp.float32), jax.jit(jnp.dot)
    record.write(out, lambda: product(matrix, matrix).block_until_ready(), task.batch)


def build(task: Task, text: Text, work: Path, record: Recorder) -> None:
    """Makes the cache anew, and notes `build_seconds`, from the parameters in memory on, and `cache_bytes` on disk."""
    config, params = load_hf(work / "ours" / "teacher")
    params, place = float32(config, params), work / "cache"
    for left in (place, place.with_name("cache.partial")):
        shutil.rmtree(left, ignore_errors=True)
    like = batch_of(task, text, np.arange(task.batch), task.widths[-1])
    began = time.perf_counter()
    key = distill.fingerprint(params, "peers")
    order = np.argsort(text.lengths, kind="stable")
    short_first = (narrow(task, text, rows) for rows in visits_once(order, task.batch))
    distill.build_cache(functional(config), params, short_first, place, samples=task.rows, like=like, key=key)
    seconds = time.perf_counter() - began
    (work / "cache.key").write_text(key)
    files = (path.stat().st_size for path in place.rglob("*") if path.is_file())
    record.note(build_seconds=seconds, cache_bytes=sum(files))


def from_cache(work: Path) -> distill.Teacher:
    """The teacher whose states a process before has cached: of its weights, only the head's are read."""
    config, params = open_hf(work / "ours" / "teacher")
    cache = distill.open_cache(work / "cache", key=(work / "cache.key").read_text(), in_memory=True)
    return distill.cached(functional(config), params, cache)


def train(task: Task, text: Text, work: Path, record: Recorder, teacher: distill.Teacher, steps: int) -> None:
    """Compiles and warms every program, then trains the student from its first weights and records each step."""
    config, start = load_hf(work / "ours" / "student")
    optimizer = make_optimizer(task, steps)
    step = distill.make_step(functional(config), optimizer, LOSS, teacher=teacher)
    warm(step, distill.init_state(float32(config, start), optimizer), stream(task, text), steps, teacher)
    state = jax.block_until_ready(distill.init_state(float32(config, start), optimizer))
    record.ready()
    distill.train(
        step,
        state,
        stream(task, text),
        steps=steps,
        teacher=teacher,
        report=lambda told: record.step(told.metrics["loss"]),
        report_every=1,
    )


def make_optimizer(task: Task, steps: int) -> distill.Optimizer:
    """AdamW at a constant rate, unclipped as with the peers; the image side, which no row reaches, is not trained."""
    config = distill.OptimizerConfig(
        learning_rate=task.learning_rate, schedule="constant", weight_decay=task.weight_decay, clip=math.inf
    )
    return distill.make_optimizer(config, steps, frozen=("vision", "bridge"))


def warm(step: Step, state: distill.State, source: Batches, steps: int, teacher: distill.Teacher) -> None:
    """Takes two steps of each width that the source has, so that every program is compiled; the state is given up."""
    seen: dict[int, Arrays] = {}
    for batch in islice(source, steps):
        seen.setdefault(batch["input_ids"].shape[1], batch)
    for batch in [*seen.values()] * 2:
        inputs = rows({name: x for name, x in teacher.attach(batch).items() if name != "index"})
        state, metrics = step(state, inputs, {}, teacher.params)
        jax.block_until_ready(metrics)
