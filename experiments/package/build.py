"""Compiles an exported model into one .pt2 file, and compares its answers with those of `generate`."""

import errno
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch._inductor.package.package import package_aoti
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import one_line
from antgmm_jax.io.folders import Unwritten, new_file, temporary_folder
from experiments.package.programs import Next, Start, generating
from experiments.package.requests import Answerer, Limits, Prompt, Shape, shaped, taken
from experiments.run.export_gate import TOLERANCE
from experiments.run.host.console import bar
from experiments.run.in_torch import split, torch_answers, torch_gap, torch_logits, torch_model, torch_tensors


class Packaged(NamedTuple):
    """Comparison of a package with the `generate` of transformers.

    Attributes:
        prompts: number of prompts.
        equal: number of equal answers; answers that differ after a tie are equal.
        ties: number of answers that differ after a tie.
        where: description of the first different answer; "" if there is none.
    """

    prompts: int
    equal: int
    ties: int
    where: str = ""


def build(
    directory: Path, out: Path, batches: Sequence[Mapping[str, Any]], shapes: Sequence[Shape], limits: Limits
) -> Packaged:
    """Compiles a checkpoint for some shapes of prompts, compares answers, and writes the file if all are equal.

    Args:
        directory: Hugging Face directory.
        out: .pt2 file to write.
        batches: training batches with the prompts alone under `prompt/`.
        shapes: shapes of the programs.
        limits: how answers end.

    Returns:
        The comparison.

    Raises:
        AntgmmError: PyTorch cannot trace or compile the model, a prompt is wider than every shape, answers differ, or
            the disk is full.
    """
    model = torch_model(directory).cpu()
    alone = [split(batch)[1] for batch in batches]
    needed, widest = longest(batches), max(shape.width for shape in shapes)
    if needed > widest:
        raise AntgmmError(f"the longest prompt has {needed} tokens: add --width {needed}")
    wanted = [torch_answers(model, prompt, limits.tokens, limits.pad) for prompt in alone]
    bound = cache(partial(_bound, model, batches))
    with _temporary(out) as file:
        pack(_compiled(model, alone[0], shapes, limits), file)
        results = []
        for shape in shapes:
            with one_line(lambda: f"{out} is not written: cannot load it", "free space for temporary files (TMPDIR)"):
                answer = Answerer.load(file, shape)
            results += [_compared(model, *pair, bound, answer, shape) for pair in zip(alone, wanted, strict=True)]
        if different := [result.where for result in results if result.where]:
            raise AntgmmError(f"{out} is not written: {different[0]}")
        with new_file(out) as unfinished:
            file.replace(unfinished)
    prompts, equal, ties, _ = zip(*results, strict=True)
    return Packaged(sum(prompts), sum(equal), sum(ties))


@contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """Yields a temporary path for a package. Raises Unwritten if it cannot be written."""
    try:
        with temporary_folder(out) as folder:
            yield folder / "model.pt2"
    except OSError as error:
        raise Unwritten(
            f"cannot write {out}: {error.strerror or error}; free disk space or choose another folder"
        ) from error


class _Sink(io.RawIOBase):
    """A file whose first error is raised by `check` only.

    PyTorch's archive, if a write fails, is written to once more when it is destroyed, and ends the process (SIGABRT).
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, *_: int) -> int:  # `package_aoti` rewinds what it has written
        return 0

    def write(self, data: Any) -> int:
        try:
            if self._error is None:
                self._file.write(data)
        except OSError as error:
            self._error = error
        return len(data)

    def check(self) -> None:
        if self._error is not None:
            raise self._error


def pack(programs: Mapping[str, Any], file: Path) -> None:
    """Writes compiled programs as one file.

    Args:
        programs: name -> files of a program, from `aot_compile`.
        file: .pt2 file to write.

    Raises:
        OSError: the file cannot be written.
    """
    with file.open("wb") as stream:
        sink = _Sink(stream)
        package_aoti(sink, dict(programs))  # pyright: ignore[reportArgumentType]
        sink.check()


def longest(batches: Iterable[Mapping[str, Any]]) -> int:
    """Returns the number of tokens of the longest prompt of training batches."""
    return max(int(batch["prompt/attention_mask"].sum(1).max()) for batch in batches)


def _bound(model: Any, batches: Iterable[Mapping[str, Any]]) -> float:
    """Two logits may change their order within this if each is off by the tolerance of an export."""
    scales = [np.abs(torch_logits(model, split(batch)[0], batch)).max() for batch in batches]
    return 2 * TOLERANCE * max(1.0, float(max(scales)))


def _compiled(model: Any, prompt: Prompt, shapes: Sequence[Shape], limits: Limits) -> dict[str, Any]:
    """Compiles the programs of all shapes; returns the files of each."""
    files: dict[str, Any] = {}
    metadata = {"tokens": str(limits.tokens), "eos": ",".join(map(str, limits.eos)), "pad": str(limits.pad)}
    options = {"aot_inductor.package": True, "aot_inductor.metadata": metadata}
    subject, remedy = (lambda: f"PyTorch cannot compile a {type(model).__name__}"), "serve the files with transformers"
    shown = bar("compiling programs", 2 * len(shapes))
    with shown as update, _quiet(), one_line(subject, remedy), _cache_errors(), torch.no_grad():
        for shape in shapes:
            inputs = torch_tensors(model, shaped(model, prompt, np.arange(len(prompt["input_ids"])), shape))
            start, step = Start(model, limits.tokens).eval(), Next(generating(model), limits.tokens).eval()
            token, state = start(inputs)
            arguments = {"start": (start, (inputs,)), "next": (step, (token, torch.tensor(1), state))}
            for part, (module, example) in arguments.items():
                program: Any = torch.export.export(module, example, strict=False).module()
                files[shape.program(part)] = torch._inductor.aot_compile(program, example, options=options)
                update(len(files), "")
    return files


def _compared(
    model: Any, prompt: Prompt, wanted: np.ndarray, bound: Callable[[], float], answer: Answerer, shape: Shape
) -> Packaged:
    """Compares the answers of one shape's programs to those prompts of a batch that fit."""
    rows = np.flatnonzero(prompt["attention_mask"].sum(1) <= shape.width)
    equal, ties, where = 0, 0, ""
    for begin in range(0, len(rows), shape.rows):
        chosen = rows[begin : begin + shape.rows]
        inputs = torch_tensors(model, shaped(model, prompt, chosen, shape))
        for row, given in zip(chosen, answer(inputs), strict=False):
            different = given != wanted[row]
            if different.any():
                step = int(different.argmax())
                ids = int(given[step]), int(wanted[row, step])
                tie = torch_gap(model, taken(prompt, np.array([row])), step, ids) <= bound()
                ties += tie
                where = where or (
                    "" if tie else f"an answer differs: {given.tolist()}, generate: {wanted[row].tolist()}"
                )
            equal += not different.any()
    return Packaged(len(rows), equal + ties, ties, where)


@contextmanager
def _cache_errors() -> Iterator[None]:
    """Reports that PyTorch, or the C++ compiler that it starts, cannot write temporary files."""
    try:
        yield
    except Exception as error:  # of several classes, with the error of the disk in their text
        reasons = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)]
        if not (reason := next((one for one in reasons if one in str(error)), "")):
            raise
        place = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()
        remedy = "free disk space, or set TORCHINDUCTOR_CACHE_DIR and TMPDIR to other folders"
        raise Unwritten(f"cannot write {place}: {reason}; {remedy}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warnings and logs of tracing."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
