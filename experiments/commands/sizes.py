"""The command from a budget to sizes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from antgmm_jax.errors import AntgmmError
from experiments.commands.output import Json, Maybe, Preset, emit
from experiments.commands.sources import config_of, name_of, sizes_given
from experiments.run.host.console import count, say, table


def search(
    model: Maybe = None,
    preset: Preset = "",
    params: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The most parameters that the student may have.")
    ] = None,
    latency_ms: Annotated[
        float | None,
        typer.Option(metavar="MS", help="The most milliseconds that it may take, measured on this machine."),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=N", help="A size that is not searched, e.g. vision/layers=4. Can be repeated."),
    ] = None,
    weigh: Annotated[
        list[str] | None,
        typer.Option(metavar="TOWER=W", help="How dear a tower's sizes are, 1 if not given. Can be repeated."),
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Prompt tokens of a request, the image's included.")] = 64,
    answer: Annotated[int, typer.Option(min=1, help="Its answer tokens.")] = 16,
    as_json: Json = False,
) -> None:
    """Pick legal sizes for a number of parameters or a latency, as a recipe's stages."""
    if (params is None) == (latency_ms is None):
        raise AntgmmError("search needs a budget: --params or --latency-ms, one of the two")
    if latency_ms is not None and not 0 < latency_ms < float("inf"):
        raise AntgmmError(f"--latency-ms {latency_ms}: give milliseconds above 0")
    budget = f"{latency_ms:g} ms" if params is None else f"{params} parameters"
    say(f"search: sizes of {name_of(model, preset)} within {budget}")
    from experiments.lab.planning.rates import Asked
    from experiments.lab.planning.search import run

    pins, weights = sizes_given(size or ()), _weights(weigh or ())
    if wrong := [tower for tower, weight in weights.items() if not 0 < weight < float("inf")]:
        raise AntgmmError(f"--weigh {wrong[0]}={weights[wrong[0]]:g}: give a weight above 0")
    figures = run(
        config_of(model, preset),
        parameters=params,
        latency=latency_ms,
        pins=pins,
        weights=weights,
        asked=Asked(length, answer),
    )
    emit(figures, as_json, *_shown(figures), recipe(figures["stages"]))


def _weights(texts: Sequence[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        tower, _, value = text.partition("=")
        try:
            found[tower] = float(value)
        except ValueError:
            raise AntgmmError(f"--weigh {text!r}: write it as in --weigh vision=2") from None
    return found


def _shown(figures: Mapping[str, Any]) -> Iterator[Any]:
    teacher, student = figures["teacher"], figures["student"]
    present = teacher["sizes"].items()
    yield table(
        ["axis", "teacher", "student"],
        [(axis, n, student["sizes"][axis]) for axis, n in present],
        "Sizes",
    )
    rows: list[tuple[str, ...]] = [
        (name, count(teacher[key]), count(student[key]), f"{teacher[key] / student[key]:.1f}x")
        for name, key in (("parameters", "params"), ("FLOPs a request", "flops"))
    ]
    for name, key in (("predicted latency", "predicted_ms"), ("measured latency", "measured_ms")):
        if key in student:
            shown = [f"{model[key]:.2f} ms" if key in model else "" for model in (teacher, student)]
            ratio = f"{teacher[key] / student[key]:.1f}x" if key in teacher else ""
            rows.append((name, *shown, ratio))
    asked = figures["request"]
    yield table(["", "teacher", "student", ""], rows, f"A request of {asked['length']} + {asked['answer']} tokens")
    if "tried" in figures:
        told = "; ".join(f"{each['predicted_ms']:.2f} / {each['measured_ms']:.2f}" for each in figures["tried"])
        whose = figures["machine"]
        yield f"milliseconds predicted / measured, in turn: {told}"
        yield f"{whose['cpu']}, {whose['cores']} cores, load {whose['load']}: others' work counts as latency"


def recipe(stages: Mapping[str, Mapping[str, int]]) -> str:
    """The stages of a recipe that cuts to these sizes.

    Args:
        stages: stage -> axis -> units.

    Returns:
        TOML.
    """
    parts = []
    for stage, found in stages.items():
        listed = ", ".join(f'"{axis}" = {n}' for axis, n in found.items())
        parts.append(f'[[stage]]\nname = "{stage}"\nsizes = {{ {listed} }}\n')
    return "\n".join(parts)


COMMANDS = {"search": (search, "antgmm search --preset antgmm-deep --params 600000 --size vision/layers=4")}
