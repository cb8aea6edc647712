"""Commands that serve a checkpoint, and load servers of two."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require
from experiments.commands.output import MODELS, Json, MaxNewTokens, Prompt, emit
from experiments.commands.sources import FORMS, records, template
from experiments.run.host.console import say, table


class Host(StrEnum):
    """Addresses that LitServe listens at."""

    LOCAL = "127.0.0.1"
    ALL = "0.0.0.0"


def serve(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help=f"{MODELS}.")],
    port: Annotated[int, typer.Option(min=1024, max=65535, help="Port.")] = 8000,
    host: Annotated[Host, typer.Option(help="Address to listen at.")] = Host.LOCAL,
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the served model.")] = "student",
    batch: Annotated[int, typer.Option(min=1, help="Most requests of a batch.")] = 16,
    wait_ms: Annotated[float, typer.Option(min=1, help="Milliseconds that a batch waits for further requests.")] = 5.0,
    max_new_tokens: MaxNewTokens = 32,
    timeout: Annotated[float, typer.Option(min=1, max=86_400, help="Seconds that a request may wait.")] = 60.0,
) -> None:
    """Serve a checkpoint in PyTorch with the OpenAI interface, in batches; for models that vLLM does not take."""
    if wait_ms >= 1e3 * timeout:
        raise AntgmmError(f"--wait-ms {wait_ms:g}: a batch may not wait as long as a request, --timeout {timeout:g} s")
    require("serve", "torch")
    say(f"serve: {model} at http://{host.value}:{port}/v1, until Ctrl-C or SIGTERM")
    from antgmm_jax.io.convert import open_hf
    from antgmm_jax.io.hub import local
    from antgmm_jax.io.loading import load_processor
    from experiments.serving.batches import longest_prompt
    from experiments.serving.server import Answers, check_port
    from experiments.serving.server import serve as run

    directory = local(model)
    open_hf(directory)  # here, where an error is one line
    load_processor(directory)
    longest_prompt(directory, max_new_tokens)
    check_port(host.value, port)
    api = Answers(directory, name, max_new_tokens=max_new_tokens, most=batch, wait=wait_ms / 1e3)
    run(api, name, host=host.value, port=port, timeout=timeout)


def load(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="Hugging Face directory.")],
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="Hugging Face directory.")],
    data: Annotated[str, typer.Option(metavar="DATA", help=FORMS + ".")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results as JSON.")],
    samples: Annotated[int, typer.Option(min=1, help="Number of questions, from the first.")] = 32,
    prompt: Prompt = "",
    max_new_tokens: MaxNewTokens = 8,
    clients: Annotated[list[int] | None, typer.Option(min=1, help="Clients (1, 4, 16). Can be repeated.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of load per number of clients.")] = 60.0,
    vllm: Annotated[
        Path | None,
        typer.Option("--vllm", metavar="FILE", help="Serve with vLLM, by this Python; else with `antgmm serve`."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve teacher and student, compare answers with JAX, and load both: requests per second, latency, errors."""
    require("eval", *(["serve", "torch"] if vllm is None else []))
    say(f"serving: loading servers of {teacher} and {student}")
    from experiments.lab.servers.loading import Load, measure
    from experiments.lab.servers.under_load import HEAD, equal, faults, rows
    from experiments.run.files import write_json

    under = Load(records(data, samples), max_new_tokens, tuple(clients or (1, 4, 16)), seconds, vllm)
    models = {"teacher": teacher, "student": student}
    figures = measure({name: (model, template(prompt, model)) for name, model in models.items()}, under, out.parent)
    write_json(out, figures)
    emit(figures, as_json, table(HEAD, rows(figures)), *equal(figures), *faults(figures), f"results: {out}")


COMMANDS = {"serve": (serve, "antgmm serve runs/demo/export --port 8000")}
LAB = {
    "serving": (
        load,
        "antgmm lab serving experiments/teachers/maad-m runs/demo/export --data jsonl:ads/test.jsonl --out load.json",
    ),
}
