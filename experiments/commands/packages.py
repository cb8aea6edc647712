"""The command that compiles a checkpoint into one file for PyTorch."""

from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require
from experiments.commands.output import MODELS, CheckData, CheckSamples, Json, Prompt, emit
from experiments.commands.sources import check_prompts, template
from experiments.run.host.console import say, table


def package(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help=f"{MODELS}.")],
    out: Annotated[Path, typer.Option(metavar="FILE.pt2", help="File to write.")],
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows of a request (1). Can be repeated.")] = None,
    width: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Tokens of the longest prompt, images included. Can be repeated; default: of the data."
        ),
    ] = None,
    data: CheckData = "",
    samples: CheckSamples = 32,
    prompt: Prompt = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer.")] = 16,
    as_json: Json = False,
) -> None:
    """Compile a checkpoint into one file that PyTorch runs alone, and check its answers."""
    require("torch")
    if out.suffix != ".pt2" or out.exists() or not out.parent.is_dir():
        raise AntgmmError(f"--out {out}: name a new .pt2 file in a folder that exists")
    say(f"package: compiling {model} into {out}; a program takes a minute or more")
    from antgmm_jax.io.convert import load_hf
    from experiments.package.build import build, longest
    from experiments.package.requests import Limits, Shape
    from experiments.package.times import milliseconds
    from experiments.run.ends import end_tokens

    config, params = load_hf(model)
    batches, _ = check_prompts(config, model, data, samples, template(prompt, model))
    eos, pad = end_tokens(model)
    limits = Limits(max_new_tokens, (eos,) if isinstance(eos, int) else tuple(eos), pad)
    shapes = [Shape(*each) for each in product(batch or [1], width or [longest(batches)])]
    result = build(model, out, batches, shapes, limits)
    times = milliseconds(out, shapes[0], config, params, model, batches[0], limits.tokens)
    rows = [("equal answers", f"{result.equal} of {result.prompts}")]
    rows += [(f"ms, {name}", f"{value:.2f}") for name, value in times.items()]
    figures: dict[str, Any] = {"file": str(out), **result._asdict(), "milliseconds": times}
    emit(
        figures, as_json, table([f"package, prompts {shapes[0].rows} x {shapes[0].width}", ""], rows), f"package: {out}"
    )


COMMANDS = {"package": (package, "antgmm package runs/demo/export --out student.pt2 --data jsonl:ads/test.jsonl")}
