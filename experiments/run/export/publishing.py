"""Atomic export of a model as a Hugging Face directory, with the export gate for students."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError, disk_errors
from antgmm_jax.io import folders
from antgmm_jax.io.companions import COMPANIONS, SECOND
from antgmm_jax.io.convert import save_hf
from antgmm_jax.io.loading import CONFIG
from antgmm_jax.io.placed import on_first
from antgmm_jax.io.tensors import INDEX
from antgmm_jax.parallel.processes import run_on_first
from antgmm_jax.pure import Params
from experiments.run.export import export_gate
from experiments.run.export.card import CARD, Origin, title_of, write_card
from experiments.run.export.completion import complete
from experiments.run.export.export_gate import GateResult
from experiments.run.export.served_prompt import Conversation, first_difference
from experiments.run.host.console import bar, say
from experiments.run.rows.prompts import note_prompt


class Questions(NamedTuple):
    """Questions for the export gate.

    Attributes:
        batches: training batches with prompts, as in `export_gate.check`.
        max_new_tokens: length of the greedy answers.
        eos: token or tokens that end an answer.
        pad: token after the end of an answer.
        conversations: conversations of which a server must make the token ids of training.
    """

    batches: Sequence[Mapping[str, np.ndarray]]
    max_new_tokens: int
    eos: int | list[int]
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
    recorded: bool = True,
    origin: Origin,
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
        prompt: prompt template, of the card's example.
        recorded: whether the template is stored with the files: the model was trained with it.
        origin: how the model was made, for its card.
        questions: questions for the export gate; None for no gate.

    Returns:
        Result of the gate, in the first process; None without a gate.

    Raises:
        AntgmmError: the shape is not legal, the disk is full, or the gate failed; nothing is written then.
    """
    with fresh(directory) as unchecked:
        save_hf(config, params, unchecked, like=like, dtype=dtype)
        ours = None if questions is None else on_first(config, params, dtype)
        del params  # the gate needs the devices

        def check() -> GateResult | None:
            if recorded:
                note_prompt(unchecked, prompt)
            complete(unchecked, config)
            result = None if questions is None else _checked(config, ours, unchecked, directory, questions)
            write_card(unchecked, config, origin, prompt, title=title_of(directory), gate=result)
            return result

        return run_on_first(check)


@contextmanager
def fresh(directory: Path) -> Iterator[Path]:
    """Writes a folder atomically: yields a hidden path for it, which replaces `directory` at the end.

    All processes of a run use it; the first one removes and renames.

    Args:
        directory: target folder; after an error, it is as before. One that exists may hold the files of an export only.

    Yields:
        The path of a folder that does not exist yet.

    Raises:
        AntgmmError: an error of the disk, or another process is writing the folder.
    """
    if directory.name in ("", ".."):
        raise AntgmmError(f"{directory}: name a folder to write, not one above it")
    with disk_errors(directory), ExitStack() as first:
        run_on_first(lambda: first.enter_context(fresh_alone(directory)))
        yield _hidden(directory)
        run_on_first(first.close)


@contextmanager
def fresh_alone(directory: Path) -> Iterator[Path]:
    """As `fresh`, in a single process: the others may wait for it in `run_on_first`."""
    hidden, was_there = _hidden(directory), directory.exists()
    with disk_errors(directory), folders.claimed(directory):
        check_replaceable(directory)
        shutil.rmtree(hidden, ignore_errors=True)  # left by a killed process
        try:
            yield hidden
            if directory.exists() and not was_there:
                raise AntgmmError(
                    f"{directory} was created by somebody else meanwhile: choose another name or remove it"
                )
            folders.replace(hidden, directory)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def _hidden(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.unchecked")


_OF_SYSTEMS = (".DS_Store", ".cache", ".gitattributes")
"""What file managers and downloads from the Hub leave in a folder."""


def check_replaceable(directory: Path) -> None:
    """Checks that a folder holds files of an export only.

    Args:
        directory: the folder; it may be absent.

    Raises:
        AntgmmError: it holds another file.
    """
    if other := [path for path in sorted(directory.glob("*")) if not _of_an_export(path.name)]:
        raise AntgmmError(f"{other[0]} is no file of an export, which replaces {directory}: move it elsewhere")


def _of_an_export(name: str) -> bool:
    """Whether a file of this name may be replaced with its folder; those of the system may."""
    known = name in COMPANIONS or name in (CARD, CONFIG, INDEX, SECOND) or name in _OF_SYSTEMS
    return known or name.startswith(".nfs") or name.endswith(".safetensors")


def _checked(config: LMMConfig, params: Any, written: Path, directory: Path, questions: Questions) -> GateResult:
    settings, rows = questions._asdict(), sum(len(batch["index"]) for batch in questions.batches)
    with bar("export gate: comparing PyTorch with JAX", rows) as update:
        other = first_difference(written, settings.pop("conversations"))
        result = export_gate.check(written, config, params, **settings, progress=lambda done: update(done, ""))
    if other or not result.passed:
        raise AntgmmError(f"{directory} was not written: the export gate failed: {other or result.where}")
    equal = f"{result.answers_equal:.0%} of answers equal"
    say(f"export gate: logits differ by {result.max_abs_logit_diff:.2g}, {equal}")
    return result
