"""Evaluation of a model by greedy answers to all questions, and by the loss of the right answers' tokens."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import ProcessorMixin

from antgmm_jax.blocks.pictures import without_pixels
from antgmm_jax.config import LMMConfig
from antgmm_jax.decoding import generate, phases
from antgmm_jax.io.placed import on_devices
from antgmm_jax.parallel.processes import gather
from antgmm_jax.parallel.sharding import shard_rows
from antgmm_jax.pure import Params, functional
from data.encoding import decode
from data.metrics import TokenLosses, scores
from data.source import Source
from distill.chunked import at_positions
from distill.losses import hard
from distill.teacher import model_inputs
from experiments.run.batch_size import answering, rows_that_fit
from experiments.run.host.console import say
from experiments.run.rows.samples import Samples


def evaluate(
    config: LMMConfig,
    params: Params,
    samples: Samples,
    processor: ProcessorMixin,
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    dtype: str = "float32",
    progress: Callable[[int, str], None] = lambda done, note="": None,
) -> tuple[dict, list[str]]:
    """Answers all questions and scores the answers; a line says how many right ones are too long to be given.

    Args:
        config: model config.
        params: model parameters; `Stored` ones are loaded.
        samples: encoded records.
        processor: processor of the model.
        max_new_tokens: maximum length of answers.
        batch_size: maximum number of questions per batch; fewer if they do not fit into memory.
        dtype: dtype of computation.
        progress: called with the number of answered questions.

    Returns:
        The result of `data.metrics.scores`, and the answers.
    """
    params, most, (eos, pad) = on_devices(config, params, dtype), min(batch_size, len(samples)), samples.end_tokens

    if line := too_long(samples.rows.index.answer, max_new_tokens):
        say(line)
    done = np.zeros(len(samples), bool)
    tokens, losses = np.zeros((len(samples), max_new_tokens), np.int32), np.zeros((2, len(samples)))
    vision = phases(config, max_new_tokens, (eos,), pad).vision
    # A batch decodes until its longest answer ends, so batch questions with answers of similar length.
    for batch in samples.questions(answering(config, most, max_new_tokens, dtype=dtype)):
        placed = _with_features(params, shard_rows(batch), vision)
        prompt = {**placed, **{name: placed[f"prompt/{name}"] for name in ("input_ids", "attention_mask")}}
        generated = generate(config, params, prompt, max_new_tokens=max_new_tokens, eos=eos, pad=pad)
        index, generated, *sums = gather((placed["index"], generated, *_answer_losses(config)(params, placed, {})))
        tokens[index], losses[:, index] = generated, sums
        done[index] = True
        progress(int(done.sum()), "")
    answers = decode(processor, tokens, samples.encoder.opening)
    return metrics(samples.records, answers, TokenLosses(*losses)), answers


def too_long(lengths: Int[np.ndarray, " N"], max_new_tokens: int) -> str:
    """Returns a line about right answers that are longer than generated ones can be; "" if there are none.

    Args:
        lengths: tokens of the right answers, each with its end token.
        max_new_tokens: maximum length of generated answers, which need no end token to be right.
    """
    number = int(np.sum(lengths - 1 > max_new_tokens))
    if not number:
        return ""
    longest = int(lengths.max())
    return (
        f"{number} of {len(lengths)} right answers are longer than max_new_tokens = {max_new_tokens} and count as"
        f" wrong: set max_new_tokens = {longest} (--max-new-tokens {longest} of antgmm eval and export)"
    )


def token_loss(
    config: LMMConfig,
    params: Params,
    samples: Samples,
    *,
    batch_size: int = 32,
    dtype: str = "float32",
    gates: Mapping[str, np.ndarray] | None = None,
) -> float:
    """Returns the mean cross-entropy of all right answers' tokens, the `token_loss` of `evaluate`.

    Args:
        config: model config.
        params: model parameters on the devices.
        samples: encoded records.
        batch_size: maximum number of records per batch; fewer if they do not fit into memory.
        dtype: dtype of the parameters.
        gates: gates of the model, such as `pruning.gates_of` a cut; None for all open.
    """
    losses = np.zeros((2, len(samples)))
    for batch in samples.questions(partial(rows_that_fit, config, min(batch_size, len(samples)), dtype=dtype)):
        placed = shard_rows(batch)
        index, *sums = gather((placed["index"], *_answer_losses(config)(params, placed, {**(gates or {})})))
        losses[:, index] = sums
    return float(losses[0].sum() / losses[1].sum())


def _with_features(params: Params, batch: Mapping[str, Any], vision: Callable[..., Array]) -> dict[str, Any]:
    """A batch with image features instead of pixels, for the answers and for the loss."""
    images = batch["images"]
    features = {"vision_features": vision(params, images)} if images["valid"].shape[1] else {}
    return {**batch, "images": without_pixels(images), **features}


@lru_cache(maxsize=32)
def _answer_losses(config: LMMConfig) -> Callable[..., tuple[Float[Array, " B"], Int[Array, " B"]]]:
    """Jitted (params, batch, gates) -> summed cross-entropy of each row's answer tokens, and number of these tokens."""
    pure = functional(config)

    @jax.jit
    def sums(params: Params, batch: Mapping[str, Any], gates: Mapping[str, Any]) -> tuple[Array, Array]:
        final = pure.apply(params, model_inputs(batch), gates, collect=("final",))["final"]
        values = hard(pure.head(params, at_positions(final, batch["positions"]), gates), batch["targets"])
        valid = batch["targets"] >= 0
        return jnp.sum(jnp.where(valid, values, 0.0), axis=1), valid.sum(axis=1)

    return sums


def metrics(records: Source, answers: Sequence[str], losses: TokenLosses | None = None) -> dict[str, Any]:
    """Scores the answers to all records; the result of `data.metrics.scores`.

    Args:
        records: the records.
        answers: one per record.
        losses: of the right answers, if they are known.
    """
    rows = records.expected()
    slices = [row.slice for row in rows]
    types, right = [row.type for row in rows], [row.answer for row in rows]
    return scores(types, answers, right, slices=slices if any(slices) else (), losses=losses)
