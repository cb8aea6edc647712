"""The command that scores answers of a checkpoint, of a server, or of both."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require
from data.limits import LONGEST_ANSWER
from experiments.commands.output import Json, Maybe, Mesh, Prompt, emit
from experiments.commands.sources import ANSWER_LENGTH, FORMS, answer_length, check_rows, dtypes, records, template
from experiments.run.host.console import bar, say, table

if TYPE_CHECKING:
    from antgmm_jax.config import LMMConfig
    from antgmm_jax.pure import Params
    from data.source import Source
    from experiments.run.rows.samples import Samples
    from experiments.run.scores.server import Server


class _Result(NamedTuple):
    """Scores, and the answer to every record."""

    figures: dict[str, Any]
    answers: list[str]


class _Checkpoint(NamedTuple):
    """A model in JAX, and the questions that it reads."""

    config: "LMMConfig"
    params: "Params"
    questions: "Samples"
    processor: Any


_SCORES = ("exact_match", "final_token", "rouge_l")


def evaluate(
    data: Annotated[str, typer.Option(metavar="DATA", help=FORMS + ".")],
    model: Maybe = None,
    samples: Annotated[int, typer.Option(min=0, help="Number of records, from the first; 0 for all.")] = 0,
    prompt: Prompt = "",
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            max=LONGEST_ANSWER,
            help="Maximum length of an answer; 0 for the longest one of the data, at least 32. With --url alone its"
            " bytes are counted as tokens.",
        ),
    ] = 0,
    batch: Annotated[
        int, typer.Option(min=1, max=1 << 20, help="Most questions per batch; fewer if they do not fit.")
    ] = 64,
    answers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write the answers, one JSON line per row, to a new file or over older answers."
        ),
    ] = None,
    url: Annotated[
        str,
        typer.Option(metavar="URL", help="Score a running server with the OpenAI interface, http://HOST:PORT/v1."),
    ] = "",
    served_model: Annotated[str, typer.Option(metavar="NAME", help="The server's model, if it has several.")] = "",
    clients: Annotated[int, typer.Option(min=1, help="Concurrent requests to the server.")] = 4,
    timeout: Annotated[
        float, typer.Option(min=0.001, max=86_400, help="Seconds until a reply must be complete.")
    ] = 120.0,
    as_json: Json = False,
    mesh: Mesh = "",
) -> None:
    """Evaluate a checkpoint in JAX, or a running server, or both, on a data set; scores by question type."""
    require("eval")
    if model is None and not url:
        raise AntgmmError("eval needs a checkpoint, --url with a running server, or both")
    if url:
        from experiments.run.scores.server import check_url

        check_url(url)
    if answers is not None:
        from experiments.run.scores.answer_lines import check_target

        check_target(answers)
    say(f"eval: scoring answers of {' and '.join(str(one) for one in (url, model) if one)} to {data}")
    text, results = template(prompt, model), {}
    server = _server(url, served_model, timeout) if url else None
    with _devices(mesh, model):
        source = records(data, samples)
        checkpoint = None if model is None else _opened(model, source, text)
        if server is not None:
            check_rows(source)  # it gets questions only if all rows are valid
        length = max_new_tokens or (answer_length(checkpoint.questions) if checkpoint else _enough_tokens(source))
        if server is not None:
            # What a template writes before answers was trained on, and a server may leave it there.
            before = "" if checkpoint is None else checkpoint.questions.encoder.opening
            results["server"] = _served(server, source, text, length, clients, before)
        if checkpoint is not None:
            results["JAX"] = _in_jax(checkpoint, length, batch)
    figures = {**next(iter(results.values())).figures, **({"url": url} if url else {})}
    if len(results) > 1:
        equal = sum(map(str.__eq__, results["server"].answers, results["JAX"].answers))
        figures |= {"jax": results["JAX"].figures, "equal_answers": equal}
    if answers is not None:
        from experiments.run.scores.answer_lines import write_answers

        write_answers(answers, source, *(one.answers for one in results.values()))
    columns = {name: one.figures for name, one in results.items()}
    emit(figures, as_json, *_shown(columns, figures), *([f"answers: {answers}"] if answers else []))


def _server(url: str, model: str, timeout: float) -> "Server":
    from experiments.run.scores.server import connect

    return connect(url, model=model, timeout=timeout)


def _devices(mesh: str, model: Path | None) -> AbstractContextManager:
    """The devices of a model in JAX; a server alone needs none."""
    if model is None:
        return nullcontext()
    from experiments.run.host.meshes import devices

    return devices(mesh, "", 1, 0)


def _opened(model: Path, source: "Source", prompt: str) -> _Checkpoint:
    """A checkpoint and its questions, which are valid."""
    from antgmm_jax.io.convert import open_hf
    from antgmm_jax.io.loading import load_processor
    from experiments.run.rows.samples import Samples

    config, params = open_hf(model)
    processor = load_processor(model)
    return _Checkpoint(config, params, Samples(source, processor, config, prompt=prompt), processor)


def _enough_tokens(source: "Source") -> int:
    """A maximum length of answers that lets every right one be given, whatever the tokenizer of the server."""
    # A token has at least one byte; one more for a space that some tokenizers put first, one for the end.
    longest = max(len(row.answer.encode("utf-8", "surrogatepass")) for row in source.expected()) + 2
    return min(max(ANSWER_LENGTH, longest), LONGEST_ANSWER)


def _in_jax(checkpoint: _Checkpoint, max_new_tokens: int, batch: int) -> _Result:
    """Scores and answers of a checkpoint."""
    from experiments.run.batch_size import compute_dtype
    from experiments.run.scores.scoring import scored

    dtype = compute_dtype(dtypes(checkpoint.params)[-1])
    limits = {"max_new_tokens": max_new_tokens, "batch_size": batch, "dtype": dtype}
    return _Result(*scored("answers", *checkpoint, **limits))


def _served(server: "Server", source: "Source", prompt: str, max_new_tokens: int, clients: int, before: str) -> _Result:
    """Scores and answers of a server without `before`, to valid rows."""
    from experiments.run.scores.evaluation import metrics
    from experiments.run.scores.server import answers

    with bar("answers of the server", len(source)) as update:
        given = answers(server, source, prompt, max_new_tokens=max_new_tokens, clients=clients, progress=update)
    given = [text.removeprefix(before).strip() for text in given]
    return _Result(metrics(source, given), given)


def _shown(figures: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any]) -> list[Any]:
    """The scores as a table, with a column for each of server and JAX, and one for token losses in JAX."""
    scored = [*figures.values()]
    lossy = [one for one in scored if "token_loss" in one]  # a server gives none
    rows = [
        (kind or "-", *(one["by_type"][kind] for one in scored), *(one["token_loss_by_type"][kind] for one in lossy))
        for kind in result["by_type"]
    ]
    empty = [""] * len(lossy)
    rows += [(name, *(one.get(name, "-") for one in scored), *empty) for name in _SCORES]
    if lossy:
        rows.append(("token_loss", *[""] * len(scored), *(one["token_loss"] for one in lossy)))
    head = ["question type", *(["exact match"] if len(figures) == 1 else figures), *["token loss"] * len(lossy)]
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row] for row in rows]
    shown: list[Any] = [table(head, cells, f"{result['count']} questions")]
    if "equal_answers" in result:
        shown.append(f"equal answers of server and JAX: {result['equal_answers']} of {result['count']}")
    return shown


COMMANDS = {"eval": (evaluate, "antgmm eval runs/ads/export --data jsonl:ads/test.jsonl")}
