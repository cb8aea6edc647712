"""An exported model as a .pt2 file, which PyTorch runs: two programs for each shape of prompts."""

import errno
import io
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np
import torch
from torch import Tensor
from torch._inductor.package.package import load_package, package_aoti
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import one_line
from antgmm_jax.io.folders import Unwritten
from antgmm_jax.pure import Params
from experiments.package.build import Form
from experiments.package.programs import Next, Start, generating
from experiments.package.requests import Limits, Prompt, Shape
from experiments.report.latency import Request, jax_request, torch_request
from experiments.run.export.in_torch import (
    split,
    stop_at,
    torch_answers,
    torch_gap,
    torch_logits,
    torch_model,
    torch_tensors,
)
from experiments.run.host.console import bar


class Answerer(NamedTuple):
    """The two programs of a shape.

    Attributes:
        start: inputs by name -> first token and state.
        step: token, number, state -> next token and state.
        limits: how answers end, from the file.
        inputs: what the inputs have to be, from the file as `described`.
    """

    start: Callable[..., Any]
    step: Callable[..., Any]
    limits: Limits
    inputs: str

    @classmethod
    def load(cls, file: Path, shape: Shape) -> "Answerer":
        """Loads the programs of a shape from a package."""
        start, step = (load_package(str(file), _program(part, shape)) for part in ("start", "next"))
        about = start.get_metadata()
        eos = tuple(int(token) for token in about["eos"].split(","))
        return cls(start, step, Limits(int(about["tokens"]), eos, int(about["pad"])), about["inputs"])

    def __call__(self, inputs: dict[str, Tensor]) -> np.ndarray:
        """Greedy answers, int [B, N], padded after their end.

        Raises:
            AntgmmError: the inputs are not those of the program, which reads memory without a check.
        """
        if (given := described(inputs)) != self.inputs:
            raise AntgmmError(
                f"a .pt2 program reads {self.inputs}, but these rows have {given}: rows of one package need the same"
                " number of pictures; leave out the others, or serve the files by `antgmm serve`"
            )
        tokens, eos, pad = self.limits
        token, state = self.start(**inputs)
        answer, ended = [token], torch.isin(token, torch.tensor(eos))
        while len(answer) < tokens and not ended.all():
            token, state = self.step(token, torch.tensor(len(answer)), state)
            token = torch.where(ended, pad, token)
            answer.append(token)
            ended |= torch.isin(token, torch.tensor(eos))
        return np.pad(torch.stack(answer, 1).numpy(), ((0, 0), (0, tokens - len(answer))), constant_values=pad)


def pytorch(directory: Path, config: LMMConfig, params: Params, limits: Limits) -> Form:
    """Returns the form of .pt2 files, compared with `generate` of transformers.

    Args:
        directory: Hugging Face directory of the model.
        config: model config, for times in JAX.
        params: parameters, for times in JAX.
        limits: how answers end.

    Raises:
        AntgmmError: transformers cannot load the files, or the positions of images have three axes.
    """
    if config.language.decoder.rope_sections:
        raise AntgmmError(
            f"a {config.family} has no .pt2 package: its images have positions of three axes; serve the files with vLLM"
        )
    model = torch_model(directory).cpu()
    stop_at(model, eos=[*limits.eos], pad=limits.pad)

    def load(file: Path, shape: Shape) -> Callable[[Prompt], np.ndarray]:
        answer = Answerer.load(file, shape)
        return lambda prompt: answer(torch_tensors(model, prompt))

    def requests(file: Path, shape: Shape, prompt: Prompt) -> dict[str, Request]:
        """Requests that decode exactly the most tokens of an answer."""
        device = jax.default_backend()  # the other two run on the CPU
        return {
            "JAX" if device == "cpu" else f"JAX on {device}": jax_request(config, params, prompt, limits.tokens),
            "package": _request(Answerer.load(file, shape), torch_tensors(model, prompt), limits.tokens),
            "generate": torch_request(model, prompt, limits.tokens),
        }

    return Form(
        engine="generate",
        left=not generating(model).config.is_encoder_decoder,
        answers=lambda prompt: torch_answers(model, prompt, limits.tokens, limits.pad),
        logits=lambda batch: torch_logits(model, split(batch)[0], batch),
        gap=partial(torch_gap, model),
        write=lambda examples, file: pack(_compiled(model, limits, examples), file),
        load=load,
        requests=requests,
    )


def _request(answer: Answerer, inputs: dict[str, Tensor], tokens: int) -> Request:
    """A request to the programs of a shape."""

    def request() -> tuple[float, float, float]:
        begin = time.perf_counter()
        token, state = answer.start(**inputs)
        first = time.perf_counter()
        for number in range(1, tokens):
            token, state = answer.step(token, torch.tensor(number), state)
        return 0.0, first - begin, time.perf_counter() - first

    return request


def described(inputs: Mapping[str, Tensor]) -> str:
    """Returns names, dtypes, shapes and devices of inputs, such as "input_ids int64 1x48"; no device is the CPU."""
    shown = (
        f"{name} {str(x.dtype).removeprefix('torch.')} {'x'.join(map(str, x.shape))}"
        + (f" on {x.device}" if x.device.type != "cpu" else "")
        for name, x in inputs.items()
    )
    return ", ".join(sorted(shown))


def _program(part: str, shape: Shape) -> str:
    """Name of a program in the file; `part` is "start" or "next"."""
    return f"{part}_{shape}"


def _compiled(model: Any, limits: Limits, examples: Mapping[Shape, Prompt]) -> dict[str, Any]:
    """Compiles the programs of all shapes.

    Returns:
        name -> files of a program.

    Raises:
        AntgmmError: PyTorch cannot trace or compile the model.
    """
    files: dict[str, Any] = {}
    subject, remedy = (lambda: f"PyTorch cannot compile a {type(model).__name__}"), "serve the files with transformers"
    shown = bar("compiling programs", 2 * len(examples))
    with shown as update, _quiet(), one_line(subject, remedy), _cache_errors(), torch.no_grad():
        for shape, prompt in examples.items():
            inputs = torch_tensors(model, prompt)
            start, step = Start(model, limits.tokens).eval(), Next(generating(model), limits.tokens).eval()
            about = limits.text() | {"inputs": described(inputs)}
            options = {"aot_inductor.package": True, "aot_inductor.metadata": about}
            token, state = start(**inputs)
            arguments = {"start": (start, (), inputs), "next": (step, (token, torch.tensor(1), state), {})}
            for part, (module, example, named) in arguments.items():
                program: Any = torch.export.export(module, example, named, strict=False).module()
                files[_program(part, shape)] = torch._inductor.aot_compile(program, example, named, options=options)
                update(len(files), "")
    return files


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
