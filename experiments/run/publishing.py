"""The one way by which a result leaves: a Hugging Face directory that is whole, and checked where it is a student's."""

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
from antgmm_jax.parallel.processes import by_first, gather
from antgmm_jax.pure import Params
from experiments.run import export_gate
from experiments.run.export_gate import GateResult
from experiments.run.host.console import say, working
from experiments.run.prompts import note_prompt


class Questions(NamedTuple):
    """What the export gate asks of the written files and of the parameters in memory.

    Attributes:
        batches: full training batches with prompts, as `export_gate.check` takes them.
        max_new_tokens: length of the greedy answers.
        eos: token that ends an answer.
        pad: token after the end.
    """

    batches: Sequence[Mapping[str, np.ndarray]]
    max_new_tokens: int
    eos: int
    pad: int


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
    """Writes a model as a Hugging Face directory; under its name stands a whole one that has passed, or none.

    All processes of a run call it; the first one writes.

    Args:
        config: the model.
        params: its parameters, on the devices of all processes or on the host.
        directory: where to; a directory of that name is replaced.
        like: checkpoint directory whose tokenizer, processor and other settings are taken along.
        dtype: of the tensors, by name.
        prompt: template of the prompts that the model was trained with; noted beside the files.
        questions: of the export gate, for a student; None writes without it.

    Returns:
        What the gate measured, in the first process; None without a gate.

    Raises:
        AntgmmError: a shape that cannot be served, a full disk, or a gate that does not pass; nothing is left then.
    """
    target = jax.numpy.dtype(dtype)
    params = jax.tree.map(lambda leaf: gather(leaf).astype(target), params)
    unchecked = directory.with_name(f".{directory.name}.unchecked")

    def write() -> GateResult | None:
        shutil.rmtree(unchecked, ignore_errors=True)  # of a process that was killed
        try:
            save_hf(config, params, unchecked, like=like)
            note_prompt(unchecked, prompt)
            result = None if questions is None else _checked(config, params, unchecked, directory, questions)
            folders.replace(unchecked, directory)
        finally:
            shutil.rmtree(unchecked, ignore_errors=True)
        return result

    return by_first(write)


def _checked(config: LMMConfig, params: Any, written: Path, directory: Path, questions: Questions) -> GateResult:
    with working("export gate: PyTorch answers from the files"):
        result = export_gate.check(written, config, params, **questions._asdict())
    if not result.passed:
        raise AntgmmError(f"{directory} was not written: the export gate failed: {result.where}")
    equal = f"{result.answers_equal:.0%} of answers equal"
    say(f"export gate: logits differ by {result.max_abs_logit_diff:.2g}, {equal}")
    return result
