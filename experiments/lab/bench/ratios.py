"""Benchmarks of relative speed; both sides alternate in one process, so that other load affects them equally.

There are five: importance of all units against a forward and backward pass; the FLOP rate of a distillation step
against the matmul rate; decoding against `transformers`; requests of a teacher against its student's; pruning of a
large checkpoint on disk against the speed of the disk.
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
from antgmm_jax.io.convert import save_hf
from antgmm_jax.presets import preset
from antgmm_jax.pure import Params, functional
from distill import LossConfig
from experiments.lab.bench.batches import cached_teacher, device_arrays
from experiments.lab.bench.cutting import shrinking
from experiments.lab.bench.decode_speed import PROMPT, decoding, requests
from experiments.lab.bench.flops import step_flops
from experiments.lab.bench.timing import format_spread, in_turn, milliseconds, spread
from experiments.report.latency import Latency
from experiments.run import disk_cut
from experiments.run.host.console import say, table
from experiments.run.host.facts import machine
from experiments.run.rows.random_batches import random_batch


class Scale(NamedTuple):
    """Shapes of the benchmark.

    Attributes:
        small: preset of the distillation step.
        batch: batch size in training.
        matmul: side of the matrices for the matmul rate.
        tokens: answer length in decoding.
        batches: batch sizes in decoding.
        cut: preset that is pruned on disk, and the preset with the target sizes.
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
    """Runs all benchmarks.

    Args:
        model: checkpoint for decoding; None for `antgmm-tiny` with random weights.
        student: smaller checkpoint of the same family, to compare requests.
        large: folder in which a large checkpoint is created and pruned.
        rounds: measured rounds.
        quick: whether to use small shapes.

    Returns:
        Figures as JSON types: `machine`, `importance`, `step`, `decode`, `requests` with a student, and `shrink` with a
        folder.
    """
    scale = QUICK if quick else Scale()
    figures: dict[str, Any] = {"machine": {**machine(), **versions()}, "rounds": rounds}
    if large is not None:
        # First, because memory freed by other benchmarks would stay with the process and hide its peak.
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
    """Returns versions of the compared libraries."""
    return {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers")}


def importance(config: LMMConfig, rows: int, rounds: int) -> dict[str, Any]:
    """Compares Taylor scores of all axes with a forward and backward pass, with equal loss and batch.

    Args:
        config: model config; weights are random.
        rows: batch size.
        rounds: measured rounds.

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
    """Compares the FLOP rate of a float32 distillation step (hard and soft loss, cached teacher) with the matmul rate.

    Only necessary FLOPs count, see `experiments.lab.bench.flops.step_flops`.

    Args:
        config: config of both teacher and student; weights are random.
        rows: batch size.
        side: side of the float32 matrices for the matmul rate.
        rounds: measured rounds.

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
        # The step donates its state.
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
    """Formats the figures as texts and tables.

    Args:
        figures: result of `run`.

    Returns:
        Texts and tables.
    """
    host, step = figures["machine"], figures["step"]
    rows = [
        (
            "importance of all units / forward and backward pass",
            format_spread(figures["importance"]["ratio"], ".2f"),
            "at most 1.2",
        ),
        ("FLOP rate of a distillation step / of a matmul", format_spread(step["share"], ".2f"), "at least 0.5"),
        *(
            (f"transformers' decoding time / ours, batch {n}", format_spread(result["ratio"], ".2f"), "at least 1.5")
            for n, result in figures["decode"].items()
        ),
    ]
    parts = [
        f"{host['cpu']}, {host['cores']} cores, load {host['load']} to {host['load_after']},"
        f" jax {host['jax']}, torch {host['torch']}, transformers {host['transformers']}",
        table(["ratio", "median (quartiles)", "aim"], rows, f"{figures['rounds']} rounds"),
        f"a step: {step['flops'] / 1e9:.1f} GFLOP at {step['flops_per_second']['median'] / 1e9:.1f} GFLOP/s;"
        f" matmul: {step['matmul_flops_per_second']['median'] / 1e9:.1f} GFLOP/s",
    ]
    if "shrink" in figures:
        parts += disk_cut.shown(figures["shrink"])
    if "requests" in figures:
        result = figures["requests"]
        requested = [
            (f"{engine} {model}", *(f"{result[engine][model][name]:.2f}" for name in Latency._fields))
            for engine in ("jax", "torch")
            for model in ("teacher", "student")
        ]
        head = ["milliseconds", "p50", "p95", "vision", "prefill", "decode"]
        ratios = ", ".join(f"{result[engine]['ratio']:.2f} in {engine}" for engine in ("jax", "torch"))
        parts += [table(head, requested, f"Requests of {result['tokens']} tokens"), f"teacher / student: {ratios}"]
    return parts
