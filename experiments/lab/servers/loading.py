"""Servers of teacher and student one after the other: answers beside JAX, and figures under load."""

import subprocess
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
        AntgmmError: JAX holds an accelerator, a model cannot be read, vLLM is not there or would change the
            prompt of a model, or a server does not start, does not answer, or does not end.
    """
    if jax.default_backend() != "cpu":
        raise AntgmmError("JAX would hold the accelerator that the servers need: set JAX_PLATFORMS=cpu")
    for directory, _ in models.values():  # a fault of the last one is said before the first is served
        open_hf(directory)
        if not load_processor(directory).chat_template and load.vllm is not None:
            raise AntgmmError(
                f"{directory} has no chat template, and vLLM's chat endpoint would put one of its own around the prompt"
                " of training: leave out --vllm, and `antgmm serve` is measured"
            )
    platform = None if load.vllm is None else _platform(load.vllm)
    logs.mkdir(parents=True, exist_ok=True)
    return {name: _measured(name, *model, load, platform, logs / f"{name}.log") for name, model in models.items()}


def _platform(python: Path) -> str:
    """Kind of device that vLLM would serve from, such as "cpu" or "cuda"."""
    code = "from vllm.platforms import current_platform; print(current_platform.device_type)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise AntgmmError(
            f"{python} cannot import vLLM: name the Python of its environment (`make vllm-env`)"
        ) from error
    return done.stdout.split()[-1]


def _measured(name: str, directory: Path, template: str, load: Load, platform: str | None, log: Path) -> dict[str, Any]:
    config, params = open_hf(directory)
    processor = load_processor(directory)
    samples = Samples(load.records, processor, config, prompt=template)
    limits: dict[str, Any] = {"max_new_tokens": load.max_new_tokens}
    ours = scored(f"{name}: answers in JAX", config, params, samples, processor, **limits)[1]
    with serving(lambda port: command(directory, load, platform, port), log) as url:
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


def command(directory: Path, load: Load, platform: str | None, port: int) -> list[str]:
    """Returns the command of a server.

    Args:
        directory: Hugging Face directory of the model.
        load: the load.
        platform: kind of device of vLLM; on a CPU it computes in float32, as the export check does. None for
            `antgmm serve`.
        port: port of 127.0.0.1.
    """
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
    options = ["--model", str(directory), "--served-model-name", "student"]
    options += ["--dtype", "float32", "--enforce-eager"] if platform == "cpu" else []
    memory = ["--gpu-memory-utilization", str(MEMORY)]
    greedy = ["--generation-config", "vllm"]  # no penalties from generation_config.json; end tokens are still read
    # Questions are sent in turn, so each comes again: a cache would answer what users' new pictures need computed.
    uncached = ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    server = [str(load.vllm), "-m", "vllm.entrypoints.openai.api_server"]
    return [*server, *options, *memory, *greedy, *uncached, *length, *place]
