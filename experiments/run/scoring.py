"""Scores of a model, with progress: the one call by which runs, reports and commands let a model answer."""

from typing import Any

from transformers import ProcessorMixin

from antgmm_jax.config import LMMConfig
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
) -> tuple[dict[str, Any], list[str]]:
    """Lets a model answer every question; all processes of a run do it together.

    Args:
        title: of the progress bar.
        config: the model.
        params: its parameters.
        records: encoded records.
        processor: decodes answers.
        max_new_tokens: longest answer.
        batch_size: questions at a time.

    Returns:
        What `data.metrics.scores` gives, and the answers.
    """
    with bar(title, len(records)) as update:
        return evaluate(
            config,
            params,
            records,
            processor,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=update,
        )
