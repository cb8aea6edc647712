"""The command that compiles a checkpoint into one file for PyTorch or for JAX."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require
from experiments.commands.output import MODELS, CheckData, CheckSamples, CheckTokens, Json, Prompt, emit
from experiments.commands.sources import check_prompts, template
from experiments.run.host.console import say, table

if TYPE_CHECKING:
    from experiments.package.build import Form


def _pytorch() -> "Callable[..., Form]":
    from experiments.package.pytorch import pytorch

    return pytorch


def _stablehlo() -> "Callable[..., Form]":
    from experiments.package.stablehlo import stablehlo

    return stablehlo


MOST_ROWS, LONGEST_PROMPT = 1024, 1 << 15
"""Rows, and tokens of a prompt, of the largest program: the answers of each are checked."""


class Kind(NamedTuple):
    """A kind of package.

    Attributes:
        runs: what runs it.
        extra: the extra that writes it.
        duration: how long a program takes to compile.
        form: imports and returns the function that makes its form.
    """

    runs: str
    extra: str
    duration: str
    form: "Callable[[], Callable[..., Form]]"


KINDS = {
    ".pt2": Kind("PyTorch", "torch", "a minute or more", _pytorch),
    ".stablehlo": Kind("JAX on CPUs, GPUs and TPUs", "stablehlo", "some seconds", _stablehlo),
}
"""Suffix of a package -> its kind."""


def package(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help=f"{MODELS}.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help=f"File to write: {', '.join(f'{suffix} for {kind.runs}' for suffix, kind in KINDS.items())}.",
        ),
    ],
    batch: Annotated[
        list[int] | None, typer.Option(min=1, max=MOST_ROWS, help="Rows of a request (1). Can be repeated.")
    ] = None,
    width: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=LONGEST_PROMPT,
            help="Tokens of the longest prompt, images included. Can be repeated; default: of the data.",
        ),
    ] = None,
    data: CheckData = "",
    samples: CheckSamples = 32,
    prompt: Prompt = "",
    max_new_tokens: CheckTokens = 0,
    as_json: Json = False,
) -> None:
    """Compile a checkpoint into one file that PyTorch or JAX runs alone, and check its answers."""
    kind = KINDS.get(out.suffix)
    if kind is None or out.exists() or out.is_symlink() or not out.parent.is_dir():
        raise AntgmmError(f"--out {out}: name a new {' or '.join(KINDS)} file in a folder that exists")
    require(kind.extra)
    say(f"package: compiling {model} into {out}; a program takes {kind.duration}")
    from antgmm_jax.io.convert import load_hf
    from experiments.package.build import build, example, longest
    from experiments.package.requests import Limits, Shape
    from experiments.package.times import milliseconds
    from experiments.run.export.completion import ends_of
    from experiments.run.export.ends import as_tuple

    config, params = load_hf(model)
    batches, _, tokens = check_prompts(config, model, data, samples, template(prompt, model), max_new_tokens)
    eos, pad = ends_of(model, config)
    limits = Limits(tokens, as_tuple(eos), pad)
    shapes = [Shape(*each) for each in product(batch or [1], width or [longest(batches)])]
    form = kind.form()(model, config, params, limits)
    result = build(out, batches, shapes, form)
    times = milliseconds(form.requests(out, shapes[0], example(batches, shapes[0], left=form.left)))
    rows = [("equal answers", f"{result.equal} of {result.prompts}")]
    rows += [(f"ms, {name}", f"{value:.2f}") for name, value in times.items()]
    figures: dict[str, Any] = {"file": str(out), **result._asdict(), "milliseconds": times}
    emit(figures, as_json, table([f"package, prompts {shapes[0]}", ""], rows), f"package: {out}")


COMMANDS = {"package": (package, "antgmm package runs/demo/export --out student.pt2 --data jsonl:ads/test.jsonl")}
