"""Processes that are copies of one that has imported what runs need: the imports take as long as a small run."""

import gc
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax

from tests.experiments import killed_run

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.experiments.killed_run", "torch", "rouge_score.rouge_scorer", "codecarbon"])


def forked(function: Callable[..., Any], *arguments: Any, output: str | Path = os.devnull) -> BaseProcess:
    """Starts a function in a process.

    Args:
        function: the function, of a module that the process can import.
        arguments: its arguments.
        output: file to which the output of the process is appended.

    Returns:
        The process.
    """
    process = _CONTEXT.Process(target=_called, args=(function, arguments, output))
    process.start()
    return process


def forked_run(*words: str, flags: str, count: int | None = None) -> BaseProcess:
    """Starts a run that may kill itself.

    Args:
        words: arguments of `tests.experiments.killed_run.main`.
        flags: flags of XLA.
        count: number of simulated devices; None to leave it to the mesh.

    Returns:
        The process.
    """
    return forked(run, words, flags, count)


def run(words: tuple[str, ...], flags: str, count: int | None = None) -> None:
    """What `forked_run` starts."""
    os.environ["XLA_FLAGS"] = flags
    if count is not None:
        jax.config.update("jax_num_cpu_devices", count)
    killed_run.main(*words)


def _called(function: Callable[..., Any], arguments: tuple, output: str | Path) -> None:
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # As in conftest: else Python's collector passes over the objects of all libraries again and again.
    gc.freeze()
    gc.set_threshold(20_000)
    function(*arguments)
