"""Evaluation of a model by greedy answers to all questions."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.decoding import generate
from antgmm_jax.io.placed import on_devices
from antgmm_jax.parallel.processes import gather
from antgmm_jax.parallel.sharding import shard_rows
from antgmm_jax.pure import Params
from data.encoding import decode
from data.metrics import scores
from data.source import Source
from experiments.run.batch_size import rows_that_fit
from experiments.run.samples import Samples


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
    """Answers all questions and scores the answers.

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
    params = on_devices(config, params, dtype)
    lengths = {**samples.lengths, "answer": max_new_tokens}
    batch_size = rows_that_fit(config, min(batch_size, len(samples)), **lengths, dtype=dtype)
    tokens, done = np.zeros((len(samples), max_new_tokens), np.int32), 0
    # A batch decodes until its longest answer ends, so batch questions with answers of similar length.
    for batch in samples.in_order(batch_size, prompts=True, by_length=True):
        prompt = {name: batch[f"prompt/{name}"] for name in ("input_ids", "attention_mask")}
        prompt |= {name: batch[name] for name in ("images", "index")}
        (eos, pad), placed = samples.end_tokens, shard_rows(prompt)
        generated = generate(config, params, placed, max_new_tokens=max_new_tokens, eos=eos, pad=pad)
        index, generated = gather((placed["index"], generated))
        tokens[index] = generated
        done += len(index)
        progress(min(done, len(samples)), "")
    answers = decode(processor, tokens)
    return metrics(samples.records, answers), answers


def metrics(records: Source, answers: Sequence[str]) -> dict[str, Any]:
    """Scores the answers to all records; the result of `data.metrics.scores`.

    Args:
        records: the records.
        answers: one per record.
    """
    rows = [records.words(row) for row in range(len(records))]
    slices = [row.slice for row in rows]
    expected = [row.answer for row in rows]
    return scores([row.type for row in rows], answers, expected, slices=slices if any(slices) else ())
