"""Servers of teacher and student one after the other: answers beside JAX, and figures under load."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.loading import load_processor
from data.source import Source
from experiments.lab.servers.starting import serving
from experiments.lab.servers.under_load import under_load
from experiments.run.export.completion import positions
from experiments.run.host.console import say
from experiments.run.rows.samples import Samples
from experiments.run.scores.scoring import scored
from experiments.run.scores.server import answers, connect

MEMORY = 0.4
"""Part of the memory, of a CPU's too, that vLLM takes: it refuses to start with less, and this process holds some."""


class Load(NamedTuple):
    """What servers are loaded with.

    Attributes:
        records: questions, sent in turn.
        max_new_tokens: maximum length of answers.
        clients: numbers of concurrent clients.
        seconds: duration for each of them.
        vllm: Python with vLLM, or None for `antgmm serve`.
    """

    records: Source
    max_new_tokens: int
    clients: tuple[int, ...]
    seconds: float
    vllm: Path | None = None


def measure(models: Mapping[str, tuple[Path, str]], load: Load, logs: Path) -> dict[str, Any]:
    """Serves models one after another and loads each.

    Args:
        models: "teacher" and "student" -> Hugging Face directory and prompt template.
        load: the load.
        logs: folder for the logs of the servers.

    Returns:
        model -> `questions`, `equal_to_jax`, and `load`, number of clients -> the result of `under_load`.

    Raises:
        AntgmmError: JAX holds an accelerator, or a server does not start, does not answer, or does not end.
    """
    if jax.default_backend() != "cpu":
        raise AntgmmError("JAX would hold the accelerator that the servers need: set JAX_PLATFORMS=cpu")
    logs.mkdir(parents=True, exist_ok=True)
    return {name: _measured(name, *model, load, logs / f"{name}.log") for name, model in models.items()}


def _measured(name: str, directory: Path, template: str, load: Load, log: Path) -> dict[str, Any]:
    config, params = open_hf(directory)
    processor = load_processor(directory)
    samples = Samples(load.records, processor, config, prompt=template)
    limits: dict[str, Any] = {"max_new_tokens": load.max_new_tokens}
    ours = scored(f"{name}: answers in JAX", config, params, samples, processor, **limits)[1]
    with serving(lambda port: _command(directory, load, port), log) as url:
        say(f"serving: {name} is ready")
        server = connect(url)
        alone = answers(server, load.records, template, clients=1, **limits)
        results = {
            str(number): under_load(
                server, load.records, template, alone, clients=number, duration=load.seconds, **limits
            )
            for number in load.clients
        }
    # vLLM returns what the template writes before an answer, `Encoder.opening`, as a part of it.
    opening = samples.encoder.opening
    equal = sum(mine == text.removeprefix(opening).strip() for mine, text in zip(ours, alone, strict=True))
    return {"questions": len(alone), "equal_to_jax": equal, "load": results}


def _command(directory: Path, load: Load, port: int) -> list[str]:
    place = ["--host", "127.0.0.1", "--port", str(port)]
    if load.vllm is None:
        code = "from experiments.cli import main; main()"
        return [
            sys.executable,
            "-c",
            code,
            "serve",
            str(directory),
            *place,
            "--max-new-tokens",
            str(load.max_new_tokens),
        ]
    length = ["--max-model-len", str(min(4096, positions(directory))), "--max-num-seqs", str(max(load.clients))]
    options = ["--model", str(directory), "--served-model-name", "student", "--dtype", "float32", "--enforce-eager"]
    memory = ["--gpu-memory-utilization", str(MEMORY)]
    greedy = ["--generation-config", "vllm"]  # no penalties from generation_config.json; end tokens are still read
    # Questions are sent in turn, so each comes again: a cache would answer what users' new pictures need computed.
    uncached = ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    server = [str(load.vllm), "-m", "vllm.entrypoints.openai.api_server"]
    return [*server, *options, *memory, *greedy, *uncached, *length, *place]
