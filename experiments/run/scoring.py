"""Evaluation of a model with a progress bar, for runs, reports and commands."""

from typing import Any

from transformers import ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.parallel import preemption
from antgmm_jax.pure import Params
from experiments.run.evaluation import evaluate
from experiments.run.host.console import bar
from experiments.run.samples import Samples


def scored(
    title: str,
    config: LMMConfig,
    params: Params,
    records: Samples,
    processor: ProcessorMixin,
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    dtype: str = "float32",
) -> tuple[dict[str, Any], list[str]]:
    """Evaluates a model; all processes of a run call it together.

    Args:
        title: title of the progress bar.
        config: model config.
        params: model parameters.
        records: encoded records.
        processor: processor of the model.
        max_new_tokens: maximum length of answers.
        batch_size: maximum number of questions per batch.
        dtype: dtype of computation.

    Returns:
        The result of `data.metrics.scores`, and the answers.
    """
    with bar(title, len(records), safe_point=preemption.leave) as update:
        return evaluate(
            config,
            params,
            records,
            processor,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            dtype=dtype,
            progress=update,
        )
