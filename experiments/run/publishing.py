"""Atomic export of a model as a Hugging Face directory, with the export gate for students."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import folders
from antgmm_jax.io.convert import save_hf
from antgmm_jax.parallel.processes import gather, run_on_first
from antgmm_jax.pure import Params
from experiments.run import export_gate
from experiments.run.export_gate import GateResult
from experiments.run.host.console import say, working
from experiments.run.prompts import note_prompt
from experiments.run.served_prompt import Conversation, first_difference, write_start_token


class Questions(NamedTuple):
    """Questions for the export gate.

    Attributes:
        batches: training batches with prompts, as in `export_gate.check`.
        max_new_tokens: length of the greedy answers.
        eos: token that ends an answer.
        pad: token after the end of an answer.
        conversations: conversations of which a server must make the token ids of training.
    """

    batches: Sequence[Mapping[str, np.ndarray]]
    max_new_tokens: int
    eos: int
    pad: int
    conversations: Sequence[Conversation] = ()


def publish(
    config: LMMConfig,
    params: Params,
    directory: Path,
    like: Path,
    *,
    dtype: str,
    prompt: str,
    questions: Questions | None = None,
) -> GateResult | None:
    """Exports a model as a Hugging Face directory, atomically and only if it passes the export gate.

    All processes of a run call it; the first one writes.

    Args:
        config: model config.
        params: model parameters, on the devices of all processes, on the host or `Stored`.
        directory: target folder; an existing one is replaced.
        like: checkpoint directory to copy tokenizer, processor and other settings from.
        dtype: name of the tensors' dtype.
        prompt: prompt template, stored with the files.
        questions: questions for the export gate; None for no gate.

    Returns:
        Result of the gate, in the first process; None without a gate.

    Raises:
        AntgmmError: the shape is not legal, the disk is full, or the gate failed; nothing is written then.
    """
    target = jax.numpy.dtype(dtype)
    params = jax.tree.map(lambda leaf: gather(leaf).astype(target), params)
    unchecked = directory.with_name(f".{directory.name}.unchecked")

    def write() -> GateResult | None:
        shutil.rmtree(unchecked, ignore_errors=True)  # left by a killed process
        try:
            save_hf(config, params, unchecked, like=like)
            note_prompt(unchecked, prompt)
            write_start_token(unchecked)
            result = None if questions is None else _checked(config, params, unchecked, directory, questions)
            folders.replace(unchecked, directory)
        finally:
            shutil.rmtree(unchecked, ignore_errors=True)
        return result

    return run_on_first(write)


def _checked(config: LMMConfig, params: Any, written: Path, directory: Path, questions: Questions) -> GateResult:
    with working("export gate: comparing PyTorch with JAX"):
        settings = questions._asdict()
        other = first_difference(written, settings.pop("conversations"))
        result = export_gate.check(written, config, params, **settings)
    if other or not result.passed:
        raise AntgmmError(f"{directory} was not written: the export gate failed: {other or result.where}")
    equal = f"{result.answers_equal:.0%} of answers equal"
    say(f"export gate: logits differ by {result.max_abs_logit_diff:.2g}, {equal}")
    return result
