"""Benchmarks of scoring, decoding and requests on one device, relative to its measured rates."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

import distill
import pruning
from antgmm_jax.config import LMMConfig
from antgmm_jax.decoding import phases
from antgmm_jax.pure import Params, functional
from experiments.lab.bench.batches import device_arrays, first
from experiments.lab.bench.flops import scoring_flops
from experiments.lab.bench.timing import dispatched, spread
from experiments.lab.bench.training import Limits, shares
from experiments.report.latency import PHASES, jax_request, timed
from experiments.run.export.export_gate import split
from experiments.run.host.console import say


class Model(NamedTuple):
    """A model with its parameters on the device, in the dtype of computation."""

    config: LMMConfig
    params: Params

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the parameters."""
        return jax.tree.leaves(self.params)[0].dtype


def scoring(model: Model, batch: Mapping[str, np.ndarray], limits: Limits, rounds: int) -> dict[str, Any]:
    """Measures the computation of the log-likelihood of given answers, without gradients.

    Args:
        model: the model.
        batch: from `random_batch`.
        limits: matmul rates of the device.
        rounds: measured rounds.

    Returns:
        Milliseconds, samples/s, FLOPs, and the rate relative to the matmul rates.
    """
    say(f"accelerator: scoring at batch {len(batch['targets'])}")
    loss = distill.make_loss(functional(model.config), distill.LossConfig(hard=1.0), dtype=model.dtype)
    score = jax.jit(lambda params, batch: loss(params, {}, batch, {})[0])
    seconds = dispatched(partial(score, model.params, device_arrays(batch)), rounds)
    rows, flops = len(batch["targets"]), scoring_flops(model.config, batch)
    return {
        "batch": rows,
        "ms": spread(1e3 * seconds),
        "samples_per_second": spread(rows / seconds),
        "flops": flops,
        **shares(flops, seconds, limits),
    }


def decoding(model: Model, batch: Mapping[str, np.ndarray], copy: float, rounds: int) -> dict[str, Any]:
    """Measures greedy decoding after the first token, which is part of prefill.

    Args:
        model: the model.
        batch: from `random_batch`, with the answer length.
        copy: copy rate of the device in bytes/s.
        rounds: measured rounds.

    Returns:
        Milliseconds, tokens/s, `bytes_per_step` (minimum bytes of weights and cache read or written), and `copy_share`,
        their rate relative to `copy`.
    """
    prompt = split(batch)[1]
    rows, length = batch["targets"].shape
    say(f"accelerator: decoding at batch {rows}")
    run = phases(model.config, length, (), 0)
    state = run.prefill(model.params, {**prompt, "vision_features": run.vision(model.params, prompt["images"])})
    seconds, steps = dispatched(partial(run.decode, model.params, state), rounds), length - 1
    cost = pruning.cost(model.config, rows, prompt["input_ids"].shape[1], length, itemsize=model.dtype.itemsize)
    size = sum(cost.bytes["decode"].values())
    return {
        "batch": rows,
        "ms": spread(1e3 * seconds),
        "tokens_per_second": spread(rows * steps / seconds),
        "bytes_per_step": size / steps,
        "copy_share": spread(size / seconds / copy),
    }


def requests(
    models: Mapping[str, Model], batch: Mapping[str, np.ndarray], limits: Limits, copy: float, rounds: int
) -> dict[str, Any]:
    """Measures requests at batch 1, alternating between models.

    Args:
        models: name -> model.
        batch: from `random_batch`; its first row is the request.
        limits: matmul rates of the device.
        copy: copy rate of the device in bytes/s.
        rounds: measured rounds.

    Returns:
        model -> `whole`, `vision`, `prefill` and `decode`: milliseconds, and `roofline`, the minimum time for FLOPs and
        bytes at the measured rates divided by the median.
    """
    say("accelerator: requests")
    one = first(batch, 1)
    length, answer = one["prompt/input_ids"].shape[1], one["targets"].shape[1]
    requests_by_model = {name: jax_request(*model, split(one)[1], answer) for name, model in models.items()}
    seconds = timed(requests_by_model, repeats=rounds, warmup=2)
    results = {}
    for name, model in models.items():
        cost = pruning.cost(model.config, 1, length, answer, itemsize=model.dtype.itemsize)
        least = [
            max(sum(cost.flops[phase].values()) / limits.measured, sum(cost.bytes[phase].values()) / copy)
            for phase in PHASES
        ]
        results[name] = _phases(seconds[name], least)
    return results


def _phases(seconds: np.ndarray, least: Sequence[float]) -> dict[str, Any]:
    """Spread and roofline share of the request and of each phase; seconds are [rounds, phase]."""
    columns = {"whole": (seconds.sum(axis=1), sum(least))}
    columns |= {name: (seconds[:, place], least[place]) for place, name in enumerate(PHASES)}
    return {
        name: {"ms": spread(1e3 * taken), "roofline": float(floor / np.median(taken))}
        for name, (taken, floor) in columns.items()
    }
