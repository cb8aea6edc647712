"""Times of requests to a package, beside JAX and `generate`."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antgmm_jax.config import LMMConfig
from antgmm_jax.pure import Params
from experiments.package.requests import Answerer, Shape, shaped
from experiments.report.latency import jax_request, timed, torch_request
from experiments.run.in_torch import split, torch_model, torch_tensors

ROUNDS = 30
"""Measured rounds of requests."""


def milliseconds(
    file: Path,
    shape: Shape,
    config: LMMConfig,
    params: Params,
    directory: Path,
    batch: Mapping[str, Any],
    tokens: int,
) -> dict[str, float]:
    """Measures requests of a shape that decode exactly `tokens` tokens, in turn.

    Args:
        file: .pt2 file.
        shape: shape of the request.
        config: model config.
        params: parameters.
        directory: Hugging Face directory of the model.
        batch: training batch; its first rows are the request.
        tokens: answer length.

    Returns:
        Median milliseconds of JAX, of the package, and of `generate`.
    """
    model = torch_model(directory).cpu()
    prompt = shaped(model, split(batch)[1], np.arange(len(batch["targets"])), shape)
    answer, inputs = Answerer.load(file, shape), torch_tensors(model, prompt)

    def packaged() -> tuple[float, float, float]:
        begin = time.perf_counter()
        token, state = answer.start(inputs)
        first = time.perf_counter()
        for number in range(1, tokens):
            token, state = answer.step(token, torch.tensor(number), state)
        return 0.0, first - begin, time.perf_counter() - first

    requests = {
        "JAX": jax_request(config, params, prompt, tokens),
        "package": packaged,
        "generate": torch_request(model, prompt, tokens),
    }
    seconds = timed(requests, repeats=ROUNDS, warmup=2)
    return {name: 1e3 * float(np.median(rounds.sum(axis=1))) for name, rounds in seconds.items()}
