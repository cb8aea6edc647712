"""The export gate: checks that exported files in stock `transformers` give the same results as the JAX student."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from antgmm_jax.config import LMMConfig
from antgmm_jax.decoding import generate
from antgmm_jax.io.placed import on_devices
from antgmm_jax.pure import Params, functional
from distill.chunked import at_positions
from experiments.run.export.in_torch import (
    on_cpu_if_crowded,
    split,
    stop_at,
    torch_answers,
    torch_gap,
    torch_logits,
    torch_model,
)

TOLERANCE = 1e-5
"""Allowed difference of logits relative to their largest magnitude (at least 1)."""

ROUNDING = 5.0
"""Larger differences pass up to this factor times PyTorch's own rounding error (float32 against float64), over all
prompts: attention logits of several hundreds (T5 does not scale them) amplify rounding. The amplification varies
randomly between prompts (in the demo, the worst is 48 times the median), so a single prompt's error is not a bound.
Parameters that are wrong by 0.01 % exceed the bound by a factor of twenty.
"""


class GateResult(NamedTuple):
    """Result of the comparison.

    Attributes:
        max_abs_logit_diff: largest difference of float32 logits at answer positions.
        max_abs_logit: largest magnitude of these logits.
        torch_rounding: largest difference between PyTorch's float32 and float64 logits; 0 if it was not needed.
        answers_equal: fraction of prompts with equal greedy answers, token by token. Answers are also equal if they
            differ after a tie: two tokens with logits so close that the allowed difference decides between them.
        prompts: number of prompts.
        passed: whether logits are within TOLERANCE or rounding, and all answers are equal.
        where: description of the first difference; "" if there is none.
        ties: number of prompts with answers that differ after a tie.
    """

    max_abs_logit_diff: float
    max_abs_logit: float
    torch_rounding: float
    answers_equal: float
    prompts: int
    passed: bool
    where: str
    ties: int = 0


class _Row(NamedTuple):
    """Comparison of one prompt.

    Attributes:
        name: name of the sample.
        number: its number; rows that fill a batch repeat it.
        diff: largest difference of logits.
        largest: largest magnitude of PyTorch's logits.
        gap: difference of PyTorch's logits of the first tokens that differ; 0 for equal answers.
        answers: both answers.
    """

    name: Any
    number: int
    diff: float
    largest: float
    gap: float
    answers: str


def check(
    directory: str | os.PathLike,
    config: LMMConfig,
    params: Params,
    batches: Sequence[Mapping[str, np.ndarray]],
    *,
    max_new_tokens: int,
    eos: int | list[int],
    pad: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> GateResult:
    """Compares exported files in PyTorch with the student in JAX, each on its accelerator if it has one.

    Args:
        directory: exported checkpoint.
        config: config of the student.
        params: parameters of the student.
        batches: training batches (prompts with answers) for logits, which also contain the prompts alone with the
            prefix `prompt/`, the numbers of the samples as `index` and possibly their names as `id`.
        max_new_tokens: length of the greedy answers.
        eos: token or tokens that end an answer.
        pad: token after the end of an answer.
        progress: called with the number of rows that are compared.

    Returns:
        Result of the comparison.
    """
    model, rows = torch_model(directory), []
    stop_at(model, eos=eos, pad=pad)
    # Exact: `params` are already rounded to the dtype of the files.
    params = on_devices(config, params, "float32")
    for batch in batches:
        rows += _compared(model, config, params, batch, {"max_new_tokens": max_new_tokens, "eos": eos, "pad": pad})
        progress(len(rows))
    diff, gap, scale = (float(np.max([getattr(row, name) for row in rows])) for name in ("diff", "gap", "largest"))
    bound, rounding = TOLERANCE * max(1.0, scale), 0.0
    if not (diff <= bound and gap <= 2 * bound):  # also for NaN
        rounding = _rounding(model, batches)
        bound = max(bound, ROUNDING * rounding)
    # If each logit may be off by the bound, two of them may change their order within twice the bound.
    different = [row for row in rows if not row.gap <= 2 * bound]
    where = f"the answer to sample {different[0].name} differs: {different[0].answers}" if different else ""
    if not diff <= bound:
        name = rows[int(np.argmax([row.diff for row in rows]))].name
        where = f"logits of sample {name} differ by {diff:.3g}, more than {bound:.3g}"
    once = {row.number: row for row in reversed(rows)}.values()
    equal, ties = np.mean([row not in different for row in once]), sum(0 < row.gap <= 2 * bound for row in once)
    return GateResult(diff, scale, rounding, float(equal), len(once), not where, where, ties)


def _compared(
    model: Any, config: LMMConfig, params: Params, batch: Mapping[str, np.ndarray], limits: Mapping[str, Any]
) -> list[_Row]:
    """Compares the rows of a batch."""
    inputs, prompt = split(batch)
    # By default, accelerators multiply float32 at lower precision, which exceeds the tolerance.
    with jax.default_matmul_precision("highest"):
        mine = np.asarray(answer_logits(config, params, inputs, batch["positions"]))
        answers = np.asarray(generate(config, params, prompt, **limits))
    mine = np.where(batch["targets"][:, :, None] == -100, 0.0, mine)
    reference = torch_logits(model, inputs, batch)
    torch_ids = torch_answers(model, prompt, limits["max_new_tokens"], limits["pad"])
    numbers, rows = batch["index"], []
    names = batch.get("id", numbers)
    for place, (ours, theirs) in enumerate(zip(answers, torch_ids, strict=True)):
        gap, text = 0.0, f"JAX {ours.tolist()}, PyTorch {theirs.tolist()}"
        if (ours != theirs).any():
            step = int((ours != theirs).argmax())
            alone = jax.tree.map(lambda leaf, place=place: leaf[place : place + 1], prompt)
            gap = torch_gap(model, alone, step, (int(ours[step]), int(theirs[step])))
        # NaN stays: it must not pass.
        diff, largest = (float(np.max(np.abs(x))) for x in (mine[place] - reference[place], reference[place]))
        rows.append(_Row(names[place], int(numbers[place]), diff, largest, gap, text))
    return rows


def answer_logits(
    config: LMMConfig, params: Params, inputs: Mapping[str, Any], positions: np.ndarray
) -> Float[Array, "B A V"]:
    """Returns the logits of JAX at the answer positions only.

    Args:
        config: model config.
        params: model parameters.
        inputs: model inputs, from `split`.
        positions: positions of the logits, [B, A].
    """
    return _logits_at(config)(params, inputs, jnp.asarray(positions))


@cache
def _logits_at(config: LMMConfig) -> Callable[..., Float[Array, "B A V"]]:
    pure = functional(config)

    @jax.jit
    def run(params: Params, inputs: Mapping[str, Any], positions: Array) -> Array:
        final = pure.apply(params, inputs, collect=("final",))["final"]
        return pure.head(params, at_positions(final, positions))

    return run


def _rounding(model: Any, batches: Sequence[Mapping[str, np.ndarray]]) -> float:
    """Largest difference between PyTorch's float32 and float64 logits."""
    largest = 0.0
    for batch in batches:  # again, as the logits of all prompts may not fit into memory, and neither may two models
        inputs, _ = split(batch)
        rounded = torch_logits(model, inputs, batch)
        exact = torch_logits(_double(model), inputs, batch)
        model.float()  # float64 holds every float32
        largest = max(largest, float(np.abs(exact - rounded).max()))
    return largest


@on_cpu_if_crowded
def _double(model: Any) -> Any:
    return model.double()
