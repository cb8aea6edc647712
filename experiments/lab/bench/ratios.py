"""Speed as ratios: what is compared runs in turn in one process, so that what else the machine does falls on both.

Five comparisons: importance of all structures against one forward and backward pass; a distillation step's FLOP rate
against the machine's own matmul rate; decoding against `transformers`; a teacher's requests against its student's; a
large checkpoint cut on disk against the disk itself.
"""

import importlib.metadata
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import distill
import pruning
from antgmm_jax.config import LMMConfig
from antgmm_jax.convert import save_hf
from antgmm_jax.functional import Params, functional
from antgmm_jax.presets import preset
from distill import LossConfig
from experiments.lab.bench.batches import cached_teacher, device_arrays
from experiments.lab.bench.cutting import shrinking
from experiments.lab.bench.decoding import PROMPT, decoding, requests
from experiments.lab.bench.flops import step_flops
from experiments.lab.bench.timing import in_turn, milliseconds, spread, told
from experiments.report.latency import Latency
from experiments.run import disk_cut
from experiments.run.host.console import say, table
from experiments.run.host.facts import machine
from experiments.run.random_batches import random_batch


class Scale(NamedTuple):
    """Shapes of a run of the benchmark.

    Attributes:
        small: preset of the distillation step.
        batch: rows of a training batch.
        matmul: side of the square matrices that give the machine's rate.
        tokens: length of decoded answers.
        batches: rows of the decoded batches.
        cut: preset that is cut on disk, and the one whose sizes it is cut to.
    """

    small: str = "antgmm-small"
    batch: int = 32
    matmul: int = 2048
    tokens: int = 32
    batches: tuple[int, ...] = (1, 8)
    cut: tuple[str, str] = ("antgmm-5b", "antgmm-300m")


QUICK = Scale(small="antgmm-tiny", batch=2, matmul=256, tokens=4, batches=(1,), cut=("antgmm-small", "antgmm-tiny"))


def run(
    model: Path | None, student: Path | None, large: Path | None, *, rounds: int, quick: bool = False
) -> dict[str, Any]:
    """Measures everything.

    Args:
        model: a checkpoint to decode with; None takes random weights of `antgmm-tiny`.
        student: a smaller one of the same family, to compare requests with.
        large: folder in which a large checkpoint is made and cut.
        rounds: rounds that are timed.
        quick: small shapes.

    Returns:
        Figures as JSON types: `machine`, `importance`, `step`, `decode`, `requests` where a student is given, and
        `shrink` where a folder is.
    """
    scale = QUICK if quick else Scale()
    figures: dict[str, Any] = {"machine": {**machine(), **versions()}, "rounds": rounds}
    if large is not None:
        # First: memory that was freed stays with the process and would hide what this needs.
        figures["shrink"] = shrinking(*scale.cut, large)
    figures["importance"] = importance(preset("antgmm-tiny"), scale.batch, rounds)
    figures["step"] = distillation_step(preset(scale.small), scale.batch, scale.matmul, rounds)
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            model = Path(folder) / "model"
            config = preset("antgmm-tiny")
            save_hf(config, jax.tree.map(np.asarray, functional(config).init(jax.random.key(0))), model)
        figures["decode"] = {str(rows): decoding(model, rows, scale.tokens, rounds) for rows in scale.batches}
        if student is not None:
            figures["requests"] = requests(model, student, scale.tokens, rounds)
    figures["machine"]["load_after"] = machine()["load"]
    return figures


def versions() -> dict[str, str]:
    """Versions of the libraries whose speed is compared."""
    return {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers")}


def importance(config: LMMConfig, rows: int, rounds: int) -> dict[str, Any]:
    """Taylor scores of every axis against one forward and backward pass over the parameters: same loss, same batch.

    Args:
        config: the model; its weights are random.
        rows: rows of the batch.
        rounds: rounds that are timed.

    Returns:
        `ratio` (lower is better), and milliseconds of both sides.
    """
    say("bench: importance")
    pure = functional(config)
    params, batch = pure.init(jax.random.key(0)), device_arrays(random_batch(config, rows, **PROMPT))
    full = distill.make_loss(pure, LossConfig(hard=1.0))

    def loss(params: Params, gates: Any, batch: Any) -> jax.Array:
        return full(params, gates, batch, {})[0]

    backward = jax.jit(jax.value_and_grad(loss))
    sides = {
        "importance": partial(pruning.taylor, loss, params, pruning.ones(config), [batch]),
        "forward_backward": lambda: jax.block_until_ready(backward(params, {}, batch)),
    }
    seconds = in_turn(sides, rounds)
    ratio = seconds["importance"] / seconds["forward_backward"]
    return {"batch": rows, "ratio": spread(ratio), **milliseconds(seconds)}


def distillation_step(config: LMMConfig, rows: int, side: int, rounds: int) -> dict[str, Any]:
    """A float32 distillation step (hard and soft loss, cached teacher of the student's size) against the matmul rate.

    The FLOPs counted are those that the mathematics needs: matrix products of the student's forward pass, three times
    (forward, and backward for inputs and weights), and of the teacher's head once; none for what is computed again.

    Args:
        config: teacher and student; weights are random.
        rows: rows of the batch.
        side: side of the square float32 matrices whose product gives the machine's rate.
        rounds: rounds that are timed.

    Returns:
        `share` of the matmul rate (higher is better), both rates in FLOP/s, `flops` of a step, and milliseconds.
    """
    say("bench: distillation step")
    pure = functional(config)
    params, batch = pure.init(jax.random.key(0)), random_batch(config, rows, **PROMPT)
    matrix = jnp.ones((side, side), jnp.float32)
    product = jax.jit(jnp.dot)
    optimizer = distill.make_optimizer(distill.OptimizerConfig(learning_rate=1e-4), steps=1000)
    teacher = cached_teacher(config, params, batch)
    step = distill.make_step(pure, optimizer, LossConfig(hard=0.5, soft=1.0, temperature=2.0), teacher=teacher)
    inputs = device_arrays(teacher.attach(batch))
    state = [distill.init_state(params, optimizer)]

    def take_step() -> None:
        # The state is donated: the new one takes its place.
        state[0], metrics = step(state[0], inputs, {}, teacher.params)
        jax.block_until_ready((state[0], metrics))

    seconds = in_turn({"step": take_step, "matmul": lambda: product(matrix, matrix).block_until_ready()}, rounds)
    flops = step_flops(config, config, batch)
    rate, peak = flops / seconds["step"], 2 * side**3 / seconds["matmul"]
    return {
        "batch": rows,
        "flops": flops,
        "share": spread(rate / peak),
        "flops_per_second": spread(rate),
        "matmul_flops_per_second": spread(peak),
        **milliseconds(seconds),
    }


def shown(figures: Mapping[str, Any]) -> list[Any]:
    """The figures for people.

    Args:
        figures: what `run` gave.

    Returns:
        Text and tables.
    """
    whose, step = figures["machine"], figures["step"]
    rows = [
        (
            "importance of all structures / forward and backward pass",
            told(figures["importance"]["ratio"], ".2f"),
            "at most 1.2",
        ),
        ("FLOP rate of a distillation step / of a matmul", told(step["share"], ".2f"), "at least 0.5"),
        *(
            (f"transformers' decoding time / ours, batch {n}", told(found["ratio"], ".2f"), "at least 1.5")
            for n, found in figures["decode"].items()
        ),
    ]
    parts = [
        f"{whose['cpu']}, {whose['cores']} cores, load {whose['load']} to {whose['load_after']},"
        f" jax {whose['jax']}, torch {whose['torch']}, transformers {whose['transformers']}",
        table(["ratio", "median (quartiles)", "aim"], rows, f"{figures['rounds']} rounds"),
        f"a step: {step['flops'] / 1e9:.1f} GFLOP at {step['flops_per_second']['median'] / 1e9:.1f} GFLOP/s;"
        f" matmul: {step['matmul_flops_per_second']['median'] / 1e9:.1f} GFLOP/s",
    ]
    if "shrink" in figures:
        parts += disk_cut.shown(figures["shrink"])
    if "requests" in figures:
        found = figures["requests"]
        requested = [
            (f"{engine} {model}", *(f"{found[engine][model][name]:.2f}" for name in Latency._fields))
            for engine in ("jax", "torch")
            for model in ("teacher", "student")
        ]
        head = ["milliseconds", "p50", "p95", "vision", "prefill", "decode"]
        ratios = ", ".join(f"{found[engine]['ratio']:.2f} in {engine}" for engine in ("jax", "torch"))
        parts += [table(head, requested, f"Requests of {found['tokens']} tokens"), f"teacher / student: {ratios}"]
    return parts
