"""Benchmarks of decoding against `transformers`, and of a teacher against its student."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from antgmm_jax.config import LMMConfig
from antgmm_jax.decoding import generate
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.placed import on_devices
from experiments.lab.bench.timing import in_turn, milliseconds, spread
from experiments.report.latency import Served, compare, thread_counts, with_threads
from experiments.run.export.in_torch import torch_model, torch_tensors
from experiments.run.host.console import say
from experiments.run.rows.random_batches import random_batch

PROMPT = {"words": 32, "answer": 16}
"""Prompt tokens (without image tokens) and answer tokens, similar to MAAD-synth."""


def decoding(directory: Path, rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Compares greedy decoding with `transformers.generate` on the same checkpoint, with answers of equal length.

    PyTorch is measured with each of `thread_counts`, and the best result counts: on busy cores, threads wait for each
    other, and more of them can be ten times slower.

    Args:
        directory: the checkpoint.
        rows: batch size.
        tokens: answer length.
        rounds: measured rounds.

    Returns:
        `ratio` of the times (higher is better), the best number of `torch_threads`, whether the answers are `equal`,
        and milliseconds of all variants.
    """
    say(f"bench: decoding at batch {rows}")
    config, params = load_hf(directory)
    params, prompt = on_devices(config, params, "float32"), random_prompt(config, rows)
    inputs = jax.tree.map(jnp.asarray, prompt)
    torch_generate = _torch_generate(torch_model(directory), prompt, tokens)

    def jax_generate() -> np.ndarray:
        return np.asarray(generate(config, params, inputs, max_new_tokens=tokens, eos=(), pad=0))

    sides = {f"torch_{count}": partial(with_threads, count, torch_generate) for count in thread_counts()}
    seconds = in_turn({"jax": jax_generate, **sides}, rounds)
    best = min(sides, key=lambda name: np.median(seconds[name]))
    return {
        "tokens": tokens,
        "equal": bool(np.array_equal(jax_generate(), torch_generate())),
        "torch_threads": int(best.removeprefix("torch_")),
        "ratio": spread(seconds[best] / seconds["jax"]),
        **milliseconds(seconds),
    }


def _torch_generate(model: Any, prompt: Mapping[str, np.ndarray], tokens: int) -> Callable[[], np.ndarray]:
    import torch

    # Without an end token, all answers have the same length.
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    inputs = torch_tensors(model, prompt)

    def answer() -> np.ndarray:
        with torch.no_grad():
            return model.generate(**inputs, max_new_tokens=tokens, do_sample=False).numpy()[:, -tokens:]

    return answer


def requests(teacher: Path, student: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Measures requests at batch 1 to a teacher and its student, alternating between them, in JAX and PyTorch.

    Args:
        teacher: checkpoint of the teacher.
        student: checkpoint of the student.
        tokens: answer length of both.
        rounds: measured rounds.

    Returns:
        engine -> model -> latency in milliseconds by phase, and `ratio` of the medians.
    """
    say("bench: requests")
    models = {}
    for name, directory in (("teacher", teacher), ("student", student)):
        config, params = load_hf(directory)
        models[name] = Served(config, on_devices(config, params, "float32"), directory, random_prompt(config, 1))
    results: dict[str, Any] = compare(models, tokens, rounds)
    for times in results.values():
        times["ratio"] = times["teacher"]["p50"] / times["student"]["p50"]
    return {"tokens": tokens, **results}


def random_prompt(config: LMMConfig, rows: int) -> dict[str, np.ndarray]:
    """Returns random prompts without padding."""
    batch = random_batch(config, rows, **PROMPT)
    return {
        name.removeprefix("prompt/"): batch[name] for name in ("images", "prompt/input_ids", "prompt/attention_mask")
    }
