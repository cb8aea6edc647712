"""The command that removes tokens."""

from pathlib import Path
from typing import Annotated

import typer

from antgmm_jax.extras import require
from experiments.commands.models import Model
from experiments.commands.output import Json, emit
from experiments.commands.sources import FORMS, records
from experiments.run.host.console import count, say, table


def vocabulary(
    model: Model,
    data: Annotated[str, typer.Option(metavar="DATA", help=f"Rows of the task, {FORMS}: all their tokens are kept.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to create.")],
    samples: Annotated[int, typer.Option(min=0, help="Number of these rows, from the first; 0 for all.")] = 0,
    tokens: Annotated[
        int, typer.Option(min=0, help="Number of tokens to keep; 0 for twice as many as are needed.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Remove the tokens that a task never uses, without a loss: rows keep their tokens, and those their logits."""
    require("torch")
    say(f"vocabulary: removing from {model} the tokens that {data} does not use, into {out}")
    from experiments.run.smaller_vocabulary import cut_vocabulary

    figures = cut_vocabulary(model, records(data, samples), out, size=tokens)
    numbers, params = figures["tokens"], figures["params"]
    rows = [
        ("tokens", str(numbers["before"]), str(numbers["after"])),
        ("parameters", count(params["before"]), count(params["after"])),
    ]
    title = f"{numbers['used']} tokens are in the rows"
    emit(figures, as_json, table(["", "before", "after"], rows, title), f"model: {out}")


COMMANDS = {
    "vocabulary": (
        vocabulary,
        "antgmm vocabulary checkpoints/large --data jsonl:ads/train.jsonl --out checkpoints/words",
    )
}
