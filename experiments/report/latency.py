"""Measured latency of a request, teacher and student side by side, in JAX and in PyTorch, split into its phases."""

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from antgmm_jax.config import LMMConfig
from antgmm_jax.decoding import phases
from antgmm_jax.families import family_of
from antgmm_jax.pure import Params
from experiments.run.export_gate import torch_model, torch_tensors
from experiments.run.host.console import bar
from experiments.run.host.energy import JOULES_A_KWH

PHASES = ("vision", "prefill", "decode")
LEAST, LONGEST = 10, 30.0
ENERGY_SECONDS = 1.0
"""Least time that energy is counted over: power is sampled, and the ticks of load and counters are up to 0.1 s."""


class Latency(NamedTuple):
    """Milliseconds of one request: median and 95th percentile of the whole, medians of its phases."""

    p50: float
    p95: float
    vision: float
    prefill: float
    decode: float


Request = Callable[[], tuple[float, float, float]]
"""Runs one request; seconds of vision, prefill, decode."""


def jax_request(config: LMMConfig, params: Params, prompt: Mapping[str, np.ndarray], tokens: int) -> Request:
    """A request in JAX that decodes exactly `tokens` tokens.

    Args:
        config: the model.
        params: its parameters.
        prompt: `images`, `input_ids`, `attention_mask`, batch of any size.
        tokens: answer length, the same for every model compared: a wrong short answer is not fast.

    Returns:
        The request; the first call compiles.
    """
    run = phases(config, tokens, (), 0)
    params = jax.device_put(params)
    text: dict[str, Any] = {name: np.asarray(prompt[name], np.int32) for name in ("input_ids", "attention_mask")}
    images = jax.tree.map(np.asarray, dict(prompt["images"]))
    if not images["valid"].any():
        images = jax.tree.map(lambda leaf: leaf[:, :0], images)
    text["images"] = {"valid": images["valid"]}

    def request():
        t0 = time.perf_counter()
        shown = {"vision_features": run.vision(params, images)} if images["valid"].any() else {}
        jax.block_until_ready(shown)
        t1 = time.perf_counter()
        state = jax.block_until_ready(run.prefill(params, {**text, **shown}))
        t2 = time.perf_counter()
        np.asarray(run.decode(params, state))
        return t1 - t0, t2 - t1, time.perf_counter() - t2

    return request


def torch_request(model, prompt: Mapping[str, np.ndarray], tokens: int) -> Request:
    """A request through `transformers`' own `generate` that decodes exactly `tokens` tokens.

    The phases are told apart by hooks, as generate() runs them in one call: the vision phase ends when image features
    are there, prefill when the first token's logits are.

    Args:
        model: from `export_gate.torch_model`.
        prompt: `images`, `input_ids`, `attention_mask`.
        tokens: answer length.

    Returns:
        The request.
    """
    import torch

    tensors = torch_tensors(model, prompt)
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    image_end, head = family_of(model.config.model_type).torch_ends(model)
    marks: dict[str, float] = {}

    def mark(name: str):
        def hook(*_):  # returns nothing: what a hook returns replaces the module's output
            marks.setdefault(name, time.perf_counter())

        return hook

    image_end.register_forward_hook(mark("vision"))
    head.register_forward_hook(mark("first"))

    def request():
        marks.clear()
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(**tensors, **length)
        end = time.perf_counter()
        seen = marks.get("vision", start)  # a request without a picture has no such phase
        return seen - start, marks["first"] - seen, end - marks["first"]

    return request


def timed(
    requests: Mapping[Any, Request], *, repeats: int, warmup: int, title: str = "timing requests"
) -> dict[Any, np.ndarray]:
    """Seconds of several requests by phase, in turn, so that what else the machine does falls on all alike.

    Args:
        requests: name -> request.
        repeats: rounds that are timed; slow requests fewer, at least `LEAST`, within about `LONGEST` seconds.
        warmup: rounds before, which compile.
        title: of the progress.

    Returns:
        name -> [rounds, 3], in the order of `PHASES`.
    """
    seconds: dict[Any, list[tuple[float, float, float]]] = {name: [] for name in requests}
    with bar(title, warmup + repeats) as update:
        for turn in range(warmup + repeats):
            if turn == warmup:
                begin = time.perf_counter()
            elif turn >= warmup + LEAST and time.perf_counter() - begin > LONGEST:
                break
            for name, request in requests.items():
                taken = request()
                if turn >= warmup:
                    seconds[name].append(taken)
            update(turn + 1, "")
    return {name: np.array(rows) for name, rows in seconds.items()}


def measure(
    requests: Mapping[Any, Request], *, repeats: int = 30, warmup: int = 3, title: str = "timing requests"
) -> dict[Any, Latency]:
    """Latency of several requests, timed in turn.

    Args:
        requests: name -> request.
        repeats: as in `timed`.
        warmup: rounds before, which compile.
        title: of the progress.

    Returns:
        name -> latency in milliseconds.
    """
    out = {}
    for name, seconds in timed(requests, repeats=repeats, warmup=warmup, title=title).items():
        table = 1e3 * seconds
        whole = table.sum(axis=1)
        out[name] = Latency(
            float(np.percentile(whole, 50)), float(np.percentile(whole, 95)), *map(float, np.median(table, axis=0))
        )
    return out


def consumption(request: Request, repeats: int) -> dict[str, Any]:
    """Energy of a request, from requests one after the other; warm ones.

    Args:
        request: the request.
        repeats: how many at least; `ENERGY_SECONDS` are filled.

    Returns:
        `joules` of a request: all that the machine used, idle power included, over the number of `requests`; and the
        loop's `Energy`.
    """
    from experiments.run.host.metering import metered  # an extra's; latency alone does not need it

    count = 0
    with metered() as read:
        begin = time.perf_counter()
        while count < repeats or time.perf_counter() - begin < ENERGY_SECONDS:
            request()
            count += 1
    energy = read()
    return {"joules": energy.kwh * JOULES_A_KWH / count, "requests": count, **energy._asdict()}


class Served(NamedTuple):
    """A model as it is served: in JAX, and as the directory that PyTorch reads; None for one only JAX has."""

    config: LMMConfig
    params: Params
    directory: str | os.PathLike | None
    prompt: Mapping[str, np.ndarray]


def compare(models: Mapping[Any, Served], tokens: int, repeats: int) -> dict[str, Any]:
    """Requests to several models in turn, in JAX and then in PyTorch.

    PyTorch is timed with each of `thread_counts` and counts at its best: where other work shares the cores its threads
    wait for one another, and more of them can be ten times slower.

    Args:
        models: name -> model; one without a directory is timed in JAX only.
        tokens: answer length of all.
        repeats: rounds that are timed.

    Returns:
        engine -> model -> latency in milliseconds by phase, and `energy`, the `consumption` of a request; PyTorch's
        with the `threads` that were best.
    """
    ours, theirs = {}, {}
    for name, model in models.items():
        ours[name] = jax_request(model.config, model.params, model.prompt, tokens)
        if model.directory is not None:
            request = torch_request(torch_model(model.directory), model.prompt, tokens)
            theirs |= {(name, count): partial(with_threads, count, request) for count in thread_counts()}
    jax_times = measure(ours, repeats=repeats, title="latency in JAX")
    torch_times = measure(theirs, repeats=repeats, title="latency in PyTorch")
    served = [name for name, model in models.items() if model.directory is not None]
    best = {name: min(thread_counts(), key=lambda n: torch_times[name, n].p50) for name in served}
    return {
        "jax": {
            name: {**latency._asdict(), "energy": consumption(ours[name], repeats)}
            for name, latency in jax_times.items()
        },
        "torch": {
            name: {**torch_times[name, n]._asdict(), "threads": n, "energy": consumption(theirs[name, n], repeats)}
            for name, n in best.items()
        },
    }


def thread_counts() -> list[int]:
    """How many threads PyTorch is tried with: one, and all that it would take."""
    import torch

    return sorted({1, torch.get_num_threads()})


def with_threads(count: int, work: Callable[[], Any]) -> Any:
    """What `work` gives when PyTorch may use so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return work()
    finally:
        torch.set_num_threads(before)
