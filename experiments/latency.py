"""Measured latency of a request, teacher and student side by side, in JAX and in PyTorch, split into its phases."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from antgmm_jax.config import LMMConfig
from antgmm_jax.functional import Params
from antgmm_jax.generate import phases


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
        prompt: `pixel_values`, `input_ids`, `attention_mask`, batch of any size.
        tokens: answer length, the same for every model compared: a wrong short answer is not fast.

    Returns:
        The request; the first call compiles.
    """
    run = phases(config, tokens, (), 0)
    params = jax.device_put(params)
    text = {name: np.asarray(prompt[name], np.int32) for name in ("input_ids", "attention_mask")}
    pixels = np.asarray(prompt["pixel_values"])

    def request():
        t0 = time.perf_counter()
        features = jax.block_until_ready(run.vision(params, pixels))
        t1 = time.perf_counter()
        state = jax.block_until_ready(run.prefill(params, {**text, "vision_features": features}))
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
        prompt: `pixel_values`, `input_ids`, `attention_mask`.
        tokens: answer length.

    Returns:
        The request.
    """
    import torch

    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in prompt.items()}
    for name in ("input_ids", "attention_mask"):
        tensors[name] = tensors[name].long()
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    blip2 = model.config.model_type == "blip-2"
    image_end = model.language_projection if blip2 else model.model.multi_modal_projector
    head = model.language_model.lm_head if blip2 else model.lm_head
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
        return marks["vision"] - start, marks["first"] - marks["vision"], end - marks["first"]

    return request


def measure(requests: Mapping[str, Request], *, repeats: int = 30, warmup: int = 3) -> dict[str, Latency]:
    """Times several requests in turn, so that what else the machine does falls on all alike.

    Args:
        requests: name -> request.
        repeats: rounds that are timed.
        warmup: rounds before, which compile.

    Returns:
        name -> latency in milliseconds.
    """
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in requests}
    for turn in range(warmup + repeats):
        for name, request in requests.items():
            taken = request()
            if turn >= warmup:
                seconds[name].append(taken)
    out = {}
    for name, rows in seconds.items():
        table = 1e3 * np.array(rows)
        whole = table.sum(axis=1)
        out[name] = Latency(
            float(np.percentile(whole, 50)), float(np.percentile(whole, 95)), *map(float, np.median(table, axis=0))
        )
    return out
