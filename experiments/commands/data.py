"""Commands that create data sets."""

from enum import StrEnum
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from antgmm_jax.extras import require
from data.limits import LONGEST_ANSWER
from experiments.commands.output import Json, Maybe, Prompt, Set, emit
from experiments.commands.sources import FORMS, answer_length, check_rows, config_of, records, template
from experiments.run.host.console import bar, say, table

if TYPE_CHECKING:
    from data.source import Source
    from experiments.run.rows.samples import Samples


class Form(StrEnum):
    """File formats for writing data."""

    PARQUET = "parquet"
    JSONL = "jsonl"
    CAPTIONS = "captions"
    CHAT = "chat"
    DIALOGUES = "dialogues"


def maad(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output folder.")],
    tier: Annotated[str, typer.Option(help="s, m or full.")] = "s",
    split: Annotated[list[str] | None, typer.Option(help="train, val, test or test_hard; all by default.")] = None,
    samples: Annotated[
        int, typer.Option(min=0, max=100_000_000, help="Records of each split; 0 for the default sizes.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the data set.")] = 0,
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="All but parquet write jsonl and a folder of images; chat and dialogues are conversations about two "
            "images or about one, captions say what an image shows.",
        ),
    ] = Form.PARQUET,
    as_json: Json = False,
) -> None:
    """Generate MAAD-synth (advertisements with an auditor's questions) as files."""
    if form is Form.PARQUET:
        require("parquet")
    say(f"data: generating MAAD-synth, tier {tier}, in {out}")
    from antgmm_jax.errors import AntgmmError
    from data.maad.latents import SIZES
    from data.writers import write_maad

    chosen = split or [*SIZES]
    if unknown := [name for name in chosen if name not in SIZES]:
        raise AntgmmError(f"no split {unknown[0]!r}: choose one of {', '.join(SIZES)}")
    sizes = {name: samples or SIZES[name] for name in chosen}
    before = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    with bar(f"MAAD-synth {tier}", sum(sizes.values())) as update:
        info = write_maad(
            tier,
            out,
            sizes=sizes,
            seed=seed,
            form=form.value,
            progress=lambda name, done, total: update(before[Path(name).stem] + done, name),
        )
    rows = [(name, size, info["fingerprints"][name]) for name, size in sizes.items()]
    emit(info, as_json, table(["split", "records", "fingerprint"], rows), f"written: {out}")


def prepare(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", help="A TOML file with [data] to train on, and a checkpoint (no preset)."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output folder.")],
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Encode the rows that a recipe trains on: token ids and pixels, read by later runs instead of the rows' files."""
    say(f"data: preparing the rows of {recipe} in {out}")
    from experiments.run.rows.preparing import prepare_rows

    info = prepare_rows(recipe, changes or [], out)
    table_rows = [(name, info[name]) for name in ("records", "dropped", "bytes", "fingerprint")]
    line = f'written: {out}; in a recipe: [data] kind = "prepared", path = "{out}", samples = {info["records"]}'
    emit(info, as_json, table(["", str(out)], table_rows), line)


def lmms_eval(
    data: Annotated[str, typer.Option(metavar="DATA", help=FORMS + ".")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to create; its name becomes the task's.")],
    model: Maybe = None,
    samples: Annotated[int, typer.Option(min=0, help="Number of records, from the first; 0 for all.")] = 0,
    prompt: Prompt = "",
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            max=LONGEST_ANSWER,
            help="Maximum length of an answer; 0 for the longest one of the data, at least 32. Without MODEL 32.",
        ),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Write rows as a task for lmms-eval, in the prompt that a checkpoint was trained with; scored as antgmm eval."""
    say(f"data: writing {data} as a task for lmms-eval in {out}")
    from data.harness import write_task

    source, text = records(data, samples), template(prompt, model)
    check_rows(source)
    length = max_new_tokens or answer_length(None if model is None else _encoded(source, model, text))
    if not max_new_tokens and model is None:
        say(f"note: answers are cut after {length} tokens: give --max-new-tokens, or a MODEL that counts those of rows")
    with bar("rows", len(source)) as update:
        name = write_task(source, out, text, max_new_tokens=length, progress=lambda _, done, total: update(done, ""))
    figures = {"task": name, "folder": str(out), "rows": len(source), "prompt": text, "max_new_tokens": length}
    emit(figures, as_json, f"task of {len(source)} rows: lmms-eval --include_path {out} --tasks {name} --model ...")


def _encoded(source: "Source", model: Path, prompt: str) -> "Samples":
    """Rows as a checkpoint reads them."""
    from antgmm_jax.io.loading import load_processor
    from experiments.run.rows.samples import Samples

    return Samples(source, load_processor(model), config_of(model, ""), prompt=prompt)


COMMANDS = {
    "maad": (maad, "antgmm data maad --tier s --split test --samples 100 --out maad-s"),
    "lmms-eval": (
        lmms_eval,
        "antgmm data lmms-eval runs/ads/export --data jsonl:ads/test.jsonl --out tasks/ads",
    ),
    "prepare": (prepare, "antgmm data prepare my.toml --out ads-prepared"),
}
