"""Perplexity of a pretrained language model on English prose after cuts, by importance method; then after training."""

import tempfile
import time
from collections.abc import Container, Iterator, Mapping
from math import exp
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.families import complete
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.files import read_json
from antgmm_jax.io.loading import load_processor
from antgmm_jax.pure import Params, functional
from data.readers import read_records
from distill import LossConfig, OptimizerConfig, init_state, make_optimizer, make_step, online
from experiments.lab.real import english
from experiments.run.calibration import importance
from experiments.run.files import write_json
from experiments.run.host.console import bar, say, table
from experiments.run.rows.samples import Samples
from experiments.run.schema.stage import can_score
from experiments.run.scores.evaluation import token_loss

CUTS: dict[str, tuple[float, ...]] = {
    "text/mlp": (0.9, 0.75, 0.5),
    "text/heads": (2 / 3,),
    "text/layers": (27 / 30, 24 / 30, 20 / 30),
    "text/embed": (0.75,),
}
"""Axis -> parts that are kept."""
METHODS = ("magnitude", "random", "last", "taylor", "activation", "block_influence", "principal")
TRAINED = ("activation", "block_influence", "principal")
"""Methods to train after."""
BATCH, TESTED, CALIBRATED = 8, 128, 8
"""Rows per batch, test rows, and calibration batches."""

Cut = tuple[str, int, str]
"""Axis, units kept, method."""


def cuts(config: LMMConfig) -> list[Cut]:
    """Returns all cuts of a model: every size of `CUTS`, by every method that can score the axis."""
    present = sizes(config)
    return [
        (axis, round(part * present[axis]), method)
        for axis, parts in CUTS.items()
        for part in parts
        for method in METHODS
        if can_score(method, axis)
    ]


def measured(model: Path, out: Path, *, minutes: float = 0) -> list[dict[str, Any]]:
    """Measures all cuts and writes each to a file; those in the file are not measured again, unless to train after.

    Args:
        model: Hugging Face directory.
        out: JSON file of results.
        minutes: as in `measure`.

    Returns:
        Figures as in `measure`.
    """
    figures = read_json(out)["cuts"] if out.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        rows = english.write(Path(temporary) / "english")
        trains = TRAINED if minutes else ()
        done = {_cut(one) for one in figures if "trained" in one or one["method"] not in trains}
        for one in measure(model, rows["train"], rows["test"], minutes=minutes, done=done):
            figures = [*(other for other in figures if _cut(other) != _cut(one)), one]
            say(" ".join(map(str, one.values())))
            write_json(out, {"cuts": figures})
    return figures


def _cut(figures: Mapping[str, Any]) -> Cut:
    return figures["axis"], figures["units"], figures["method"]


def measure(
    model: Path, train: Path, test: Path, *, minutes: float = 0, seed: int = 0, done: Container[Cut] = ()
) -> Iterator[dict[str, Any]]:
    """Cuts a model and measures its perplexity.

    Args:
        model: Hugging Face directory.
        train: JSONL file to calibrate and train on.
        test: JSONL file to measure on, with at least `TESTED` rows.
        minutes: duration of training after each cut by one of `TRAINED`; 0 for none.
        seed: seed of calibration batches, random scores and training.
        done: cuts to leave out; the uncut model is ("", 0, "").

    Yields:
        Figures of the uncut model, then of each cut: `axis`, `units`, `method`, `perplexity`, and after training
        `trained` and `steps`.
    """
    config, params = load_hf(model)
    processor = load_processor(model)

    def samples(path: Path, most: int) -> Samples:
        return Samples(read_records("jsonl", path, most=most), processor, config, prompt="{question}")

    rows, held = samples(train, 0), samples(test, TESTED)
    if ("", 0, "") not in done:
        yield {"axis": "", "units": 0, "method": "", "perplexity": _perplexity(config, params, held)}
    for axis, units, method in (cut for cut in cuts(config) if cut not in done):
        targets = complete(config, {axis: units})
        methods = {each: method for each in targets if can_score(method, each)}  # type: ignore[arg-type]
        scores, bases = importance(
            config, params, methods, targets, rows, batch_size=BATCH, batches=CALIBRATED, seed=seed
        )
        keep = {**pruning.plan(scores, config, targets), **bases}
        figures: dict[str, Any] = {"axis": axis, "units": units, "method": method}
        small = pruning.shrink(config, params, keep) if bases or (minutes and method in TRAINED) else None
        if bases and small:
            figures["perplexity"] = _perplexity(*small, held)
        else:
            figures["perplexity"] = _perplexity(config, params, held, pruning.gates_of(keep, config))
        if small and minutes and method in TRAINED:
            teacher = (config, params)
            trained, figures["steps"] = _trained(small, teacher, rows, 60 * minutes, seed)
            figures["trained"] = _perplexity(small[0], trained, held)
        yield figures


def _perplexity(
    config: LMMConfig, params: Params, held: Samples, gates: Mapping[str, np.ndarray] | None = None
) -> float:
    """Perplexity of the answers' tokens."""
    return exp(token_loss(config, params, held, batch_size=BATCH, gates=gates))


def _plain(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "index"}


def _trained(
    small: tuple[LMMConfig, Params], teacher: tuple[LMMConfig, Params], rows: Samples, seconds: float, seed: int
) -> tuple[Params, int]:
    """Parameters and steps of distillation for a duration; the rate is constant, as the steps are not known."""
    settings = OptimizerConfig(learning_rate=2e-4, schedule="constant", warmup=10, weight_decay=0.1)
    optimizer = make_optimizer(settings, steps=10**6)
    source = online(functional(teacher[0]), teacher[1])
    step = make_step(functional(small[0]), optimizer, LossConfig(hard=0.5, soft=1.0), teacher=source)
    state, batches, steps = init_state(small[1], optimizer), rows.shuffled(BATCH, seed), 0
    state, _ = step(state, _plain(next(batches)), {}, source.params)
    end = time.monotonic() + seconds
    with bar("training, s", round(seconds)) as shown:
        while time.monotonic() < end:
            state, metrics = step(state, _plain(next(batches)), {}, source.params)
            steps += 1
            shown(min(round(seconds), round(seconds - end + time.monotonic())), f"loss {float(metrics['loss']):.3f}")
    return optax.tree.cast(state.params, jnp.float32), steps


def shown(figures: list[dict[str, Any]]) -> Any:
    """Returns the figures as a table for the terminal."""
    head = ("cut", "method", "perplexity", "after training", "steps")
    rows = [
        (
            f"{one['axis']} {one['units']}" if one["axis"] else "none",
            one["method"],
            f"{one['perplexity']:.1f}",
            f"{one['trained']:.1f}" if "trained" in one else "",
            one.get("steps", ""),
        )
        for one in figures
    ]
    return table(head, rows)
