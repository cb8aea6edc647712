"""Measurement of request latency by phase and of energy, in JAX and PyTorch."""

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from antgmm_jax.blocks.pictures import without_pixels
from antgmm_jax.config import LMMConfig
from antgmm_jax.decoding import phases
from antgmm_jax.families import family_of
from antgmm_jax.io.placed import on_devices
from antgmm_jax.pure import Params
from experiments.run.export.in_torch import torch_model, torch_tensors
from experiments.run.host.console import bar
from experiments.run.host.energy import JOULES_A_KWH

PHASES = ("vision", "prefill", "decode")
LEAST, LONGEST = 10, 30.0
"""Minimum number of timed rounds, and the seconds after which no further round starts."""

WARMUP = 3
"""Number of rounds before the timed ones; the first one compiles."""

ENERGY_SECONDS = 1.0
"""Minimum duration of an energy measurement: counters and load are updated only every 0.1 s."""


class Latency(NamedTuple):
    """Latency in milliseconds: median and 95th percentile of the request, medians of its phases."""

    p50: float
    p95: float
    vision: float
    prefill: float
    decode: float


Request = Callable[[], tuple[float, float, float]]
"""Runs one request and returns the seconds of vision, prefill and decode."""


def jax_request(
    config: LMMConfig, params: Params, prompt: Mapping[str, np.ndarray], tokens: int, dtype: str = "float32"
) -> Request:
    """Returns a request in JAX that decodes exactly `tokens` tokens.

    Args:
        config: model config.
        params: model parameters.
        prompt: `images`, `input_ids`, `attention_mask` of any batch size.
        tokens: answer length; equal for all compared models, so that short wrong answers have no advantage.
        dtype: dtype of computation.

    Returns:
        The request; its first call compiles.
    """
    run = phases(config, tokens, (), 0)
    params = on_devices(config, params, dtype)
    text: dict[str, Any] = {name: np.asarray(prompt[name], np.int32) for name in ("input_ids", "attention_mask")}
    images = jax.tree.map(np.asarray, dict(prompt["images"]))
    if not images["valid"].any():
        images = jax.tree.map(lambda leaf: leaf[:, :0], images)
    text["images"] = without_pixels(images)

    def request():
        t0 = time.perf_counter()
        features = {"vision_features": run.vision(params, images)} if images["valid"].any() else {}
        jax.block_until_ready(features)
        t1 = time.perf_counter()
        state = jax.block_until_ready(run.prefill(params, {**text, **features}))
        t2 = time.perf_counter()
        np.asarray(run.decode(params, state))
        return t1 - t0, t2 - t1, time.perf_counter() - t2

    return request


def torch_request(model, prompt: Mapping[str, np.ndarray], tokens: int) -> Request:
    """Returns a request with the `generate` of transformers that decodes exactly `tokens` tokens.

    `generate` runs all phases in one call; hooks measure when the image features and the first logits are available.

    Args:
        model: from `in_torch.torch_model`.
        prompt: `images`, `input_ids`, `attention_mask`.
        tokens: answer length.

    Returns:
        The request.
    """
    import torch

    tensors = torch_tensors(model, prompt)
    tensors = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    image_end, head = family_of(model.config.model_type).torch_ends(model)
    marks: dict[str, float] = {}

    def wait() -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    def mark(name: str):
        def hook(*_):  # returns None: another value would replace the module's output
            wait()
            marks.setdefault(name, time.perf_counter())

        return hook

    image_end.register_forward_hook(mark("vision"))
    head.register_forward_hook(mark("first"))

    def request():
        marks.clear()
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(**tensors, **length)
        wait()
        end = time.perf_counter()
        vision_end = marks.get("vision", start)  # requests without images have no vision phase
        return vision_end - start, marks["first"] - vision_end, end - marks["first"]

    return request


def timed(
    requests: Mapping[Any, Request], *, repeats: int, warmup: int, title: str = "timing requests"
) -> dict[Any, np.ndarray]:
    """Measures the phases of several requests, alternating between them so that other load affects all equally.

    Args:
        requests: name -> request.
        repeats: number of measured rounds; fewer (but at least `LEAST`) if they take more than `LONGEST` seconds.
        warmup: number of earlier rounds, which compile.
        title: title of the progress bar.

    Returns:
        name -> seconds [rounds, 3], in the order of `PHASES`.
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
    requests: Mapping[Any, Request], *, repeats: int = 30, warmup: int = WARMUP, title: str = "timing requests"
) -> dict[Any, Latency]:
    """Measures the latency of several requests, alternating between them.

    Args:
        requests: name -> request.
        repeats: as in `timed`.
        warmup: number of earlier rounds, which compile.
        title: title of the progress bar.

    Returns:
        name -> latency in milliseconds.
    """
    times = timed(requests, repeats=repeats, warmup=warmup, title=title)
    return {name: summarised(seconds) for name, seconds in times.items()}


def summarised(seconds: np.ndarray) -> Latency:
    """Returns the latency of a request.

    Args:
        seconds: [rounds, 3], from `timed`.
    """
    table = 1e3 * seconds
    high = [float(np.percentile(table.sum(axis=1), q)) for q in (50, 95)]
    return Latency(*high, *map(float, np.median(table, axis=0)))


def consumption(request: Request, repeats: int) -> dict[str, Any]:
    """Measures the energy of a request by repeating it.

    Args:
        request: a request that is already compiled.
        repeats: number of requests; more if they take less than `ENERGY_SECONDS`, fewer after `LONGEST` seconds.

    Returns:
        `joules` per request (energy of the machine, including idle power, divided by the number of `requests`), and
        the fields of `Energy` for the whole loop.
    """
    from experiments.run.host.metering import metered  # an extra's; latency alone does not need it

    count = 0
    with metered() as read:
        begin = time.perf_counter()
        while (taken := time.perf_counter() - begin) < ENERGY_SECONDS or (count < repeats and taken < LONGEST):
            request()
            count += 1
    energy = read()
    return {"joules": energy.kwh * JOULES_A_KWH / count, "requests": count, **energy._asdict()}


class Served(NamedTuple):
    """A model to measure in JAX and, if `directory` is its Hugging Face folder, in PyTorch."""

    config: LMMConfig
    params: Params
    directory: str | os.PathLike | None
    prompt: Mapping[str, np.ndarray]


def compare(models: Mapping[Any, Served], tokens: int, repeats: int) -> dict[str, Any]:
    """Measures requests to several models, in JAX and then in PyTorch, alternating between the models.

    Args:
        models: name -> model; models without a directory are measured in JAX only.
        tokens: answer length of all models.
        repeats: number of measured rounds.

    Returns:
        engine -> model -> figures, see `in_jax` and `in_pytorch`.
    """
    return {"jax": in_jax(models, tokens, repeats), "torch": in_pytorch(models, tokens, repeats)}


def in_jax(models: Mapping[Any, Served], tokens: int, repeats: int, dtype: str = "float32") -> dict[Any, Any]:
    """Measures requests in JAX.

    Args:
        models: name -> model.
        tokens: answer length of all models.
        repeats: number of measured rounds.
        dtype: dtype of computation.

    Returns:
        model -> milliseconds by phase, the number of measured `rounds`, and `energy` from `consumption`.
    """
    requests = {
        name: jax_request(model.config, model.params, model.prompt, tokens, dtype) for name, model in models.items()
    }
    times = timed(requests, repeats=repeats, warmup=WARMUP, title="latency in JAX")
    return {name: _figures(seconds, requests[name], repeats) for name, seconds in times.items()}


def in_pytorch(models: Mapping[Any, Served], tokens: int, repeats: int, dtype: str = "float32") -> dict[Any, Any]:
    """Measures requests to the models with a directory in PyTorch.

    Each of `thread_counts` is measured, and the best result counts: on busy cores, threads wait for each other, and
    more of them can be ten times slower.

    Args:
        models: name -> model.
        tokens: answer length of all models.
        repeats: number of measured rounds.
        dtype: dtype of computation.

    Returns:
        model -> figures as of `in_jax`, and the best number of `threads`.
    """
    import torch

    requests = {}
    for name, model in models.items():
        if model.directory is not None:
            served = torch_model(model.directory).to(getattr(torch, dtype))
            request = torch_request(served, model.prompt, tokens)
            requests |= {(name, count): partial(with_threads, count, request) for count in thread_counts()}
    times = timed(requests, repeats=repeats, warmup=WARMUP, title="latency in PyTorch")
    with_files = [name for name, model in models.items() if model.directory is not None]
    best = {name: min(thread_counts(), key=lambda n: summarised(times[name, n]).p50) for name in with_files}
    return {name: {**_figures(times[name, n], requests[name, n], repeats), "threads": n} for name, n in best.items()}


def _figures(seconds: np.ndarray, request: Request, repeats: int) -> dict[str, Any]:
    """Figures of a request that was timed, and its energy."""
    return {**summarised(seconds)._asdict(), "rounds": len(seconds), "energy": consumption(request, repeats)}


def thread_counts() -> list[int]:
    """Returns the numbers of threads to try in PyTorch: one, and its default."""
    import torch

    return sorted({1, torch.get_num_threads()})


def with_threads(count: int, work: Callable[[], Any]) -> Any:
    """Calls a function with a limit on PyTorch's threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return work()
    finally:
        torch.set_num_threads(before)
