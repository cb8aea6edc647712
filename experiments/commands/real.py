"""Commands of `antgmm lab` with a pretrained language model, SmolLM2-135M, from a package of the registry."""

import json
from pathlib import Path
from typing import Annotated

import typer

from antgmm_jax.extras import require
from experiments.commands.output import Json, emit
from experiments.run.host.console import say


def smollm2(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to create.")],
    trained: Annotated[
        Path | None, typer.Option("--delta", metavar="FILE", help="What a training changed, from `antgmm lab delta`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a vision-language model of SmolLM2-135M and a new image side for MAAD-synth's tier m, or a trained one."""
    require("torch")
    say(f"smollm2: writing the model in {out}")
    from experiments.lab.real.base import write

    write(out, trained)
    emit({"model": str(out)}, as_json, f"model: {out}")


def delta(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Export of a training, float32.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="What the training changed, safetensors.")],
    rank: Annotated[int, typer.Option(min=1, help="Rank of the stored factors.")] = 20,
    as_json: Json = False,
) -> None:
    """Store what a training changed in the model of `antgmm lab smollm2`."""
    require("torch")
    say(f"delta: comparing {model} with the untrained model")
    from experiments.lab.real.base import save_delta

    size = save_delta(model, out, rank)
    emit({"file": str(out), "bytes": size}, as_json, f"{size / 1e6:.1f} MB: {out}")


def cuts(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder of `antgmm lab smollm2`.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results as JSON; cuts in it are kept.")],
    minutes: Annotated[float, typer.Option(min=0, help="Training after each cut by the better methods.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of a pretrained language model after cuts, by importance method."""
    say(f"cuts: measuring perplexity after cuts of {model}")
    from experiments.lab.real.cuts import measured, shown

    figures = measured(model, out, minutes=minutes)
    emit(json.loads(out.read_text()), as_json, shown(figures), f"results: {out}")


COMMANDS = {
    "smollm2": (smollm2, "antgmm lab smollm2 --out runs/real/base, after make smollm2"),
    "delta": (delta, "antgmm lab delta runs/real/answers/export --out delta.safetensors"),
    "cuts": (cuts, "antgmm lab cuts runs/real/base --out experiments/lab/results/cuts.json"),
}
