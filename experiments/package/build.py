"""Compiles an exported model into one .pt2 file, and compares its answers with those of `generate`."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._inductor.package.package import package_aoti

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.folders import new_file
from antgmm_jax.io.loading import one_line
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
        AntgmmError: PyTorch cannot trace or compile the model, a prompt is wider than every shape, or answers differ.
    """
    model = torch_model(directory).cpu()
    alone = [split(batch)[1] for batch in batches]
    needed, widest = longest(batches), max(shape.width for shape in shapes)
    if needed > widest:
        raise AntgmmError(f"the longest prompt has {needed} tokens: add --width {needed}")
    wanted = [torch_answers(model, prompt, limits.tokens, limits.pad) for prompt in alone]
    bound = cache(partial(_bound, model, batches))
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", suffix=".tmp", dir=out.parent) as folder:
        file = _compiled(model, alone[0], shapes, limits, Path(folder))
        results = []
        for shape in shapes:
            answer = Answerer.load(file, shape)
            results += [_compared(model, *pair, bound, answer, shape) for pair in zip(alone, wanted, strict=True)]
        if different := [result.where for result in results if result.where]:
            raise AntgmmError(f"{out} is not written: {different[0]}")
        with new_file(out) as unfinished:
            file.replace(unfinished)
    prompts, equal, ties, _ = zip(*results, strict=True)
    return Packaged(sum(prompts), sum(equal), sum(ties))


def longest(batches: Iterable[Mapping[str, Any]]) -> int:
    """Returns the number of tokens of the longest prompt of training batches."""
    return max(int(batch["prompt/attention_mask"].sum(1).max()) for batch in batches)


def _bound(model: Any, batches: Iterable[Mapping[str, Any]]) -> float:
    """Two logits may change their order within this if each is off by the tolerance of an export."""
    scales = [np.abs(torch_logits(model, split(batch)[0], batch)).max() for batch in batches]
    return 2 * TOLERANCE * max(1.0, float(max(scales)))


def _compiled(model: Any, prompt: Prompt, shapes: Sequence[Shape], limits: Limits, folder: Path) -> Path:
    """Compiles the programs of all shapes into a file."""
    files: dict[str, Any] = {}
    metadata = {"tokens": str(limits.tokens), "eos": ",".join(map(str, limits.eos)), "pad": str(limits.pad)}
    options = {"aot_inductor.package": True, "aot_inductor.metadata": metadata}
    subject, remedy = (lambda: f"PyTorch cannot compile a {type(model).__name__}"), "serve the files with transformers"
    with bar("compiling programs", 2 * len(shapes)) as update, _quiet(), one_line(subject, remedy), torch.no_grad():
        for shape in shapes:
            inputs = torch_tensors(model, shaped(model, prompt, np.arange(len(prompt["input_ids"])), shape))
            start, step = Start(model, limits.tokens).eval(), Next(generating(model), limits.tokens).eval()
            token, state = start(inputs)
            arguments = {"start": (start, (inputs,)), "next": (step, (token, torch.tensor(1), state))}
            for part, (module, example) in arguments.items():
                program: Any = torch.export.export(module, example, strict=False).module()
                files[shape.program(part)] = torch._inductor.aot_compile(program, example, options=options)
                update(len(files), "")
        file = folder / "model.pt2"
        package_aoti(str(file), files)
        return file


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
