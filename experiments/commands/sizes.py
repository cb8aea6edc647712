"""The command that searches sizes for a budget."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from antgmm_jax.errors import AntgmmError
from data.limits import LONGEST_ANSWER
from experiments.auto.goal import parameters
from experiments.commands.output import Json, Length, Maybe, Preset, emit
from experiments.commands.sources import config_of, name_of, sizes_given
from experiments.run.host.console import count, say, table

WEIGHTS = 1e-6, 1e6
"""Least and most weight of an axis."""


def search(
    model: Maybe = None,
    preset: Preset = "",
    params: Annotated[
        str, typer.Option(metavar="N", help="Maximum number of parameters of the student, such as 10M.")
    ] = "",
    latency_ms: Annotated[
        float | None,
        typer.Option(metavar="MS", help="Maximum latency of a request in milliseconds, measured on this machine."),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=N", help="A fixed size, e.g. vision/layers=4. Can be repeated."),
    ] = None,
    weigh: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOWER=W",
            help="Weight of a tower or an axis: a higher one prunes it less; 1 by default. Can be repeated.",
        ),
    ] = None,
    length: Length = 0,
    answer: Annotated[int, typer.Option(min=1, max=LONGEST_ANSWER, help="Answer tokens of a request.")] = 16,
    as_json: Json = False,
) -> None:
    """Search legal sizes for a number of parameters or a latency, as stages of a recipe."""
    most = parameters(params) if params else None
    if (most is None) == (latency_ms is None):
        raise AntgmmError("search needs a budget: either --params or --latency-ms")
    if latency_ms is not None and not 0 < latency_ms < float("inf"):
        raise AntgmmError(f"--latency-ms {latency_ms}: it must be above 0")
    budget = f"{latency_ms:g} ms" if most is None else f"{most} parameters"
    say(f"search: sizes of {name_of(model, preset)} within {budget}")
    from experiments.lab.planning.rates import RequestSize
    from experiments.lab.planning.search import run
    from experiments.run.rows.random_batches import usual_length

    pins, weights = sizes_given(size or ()), _weights(weigh or ())
    low, high = WEIGHTS
    if wrong := [tower for tower, weight in weights.items() if not low <= weight <= high]:
        raise AntgmmError(f"--weigh {wrong[0]}={weights[wrong[0]]:g}: choose a number from {low:g} to {high:g}")
    config = config_of(model, preset)
    figures = run(
        config,
        parameters=most,
        latency=latency_ms,
        pins=pins,
        weights=weights,
        request=RequestSize(usual_length(config, length), answer),
    )
    emit(figures, as_json, *_shown(figures), recipe(figures["stages"]))


def _weights(texts: Sequence[str]) -> dict[str, float]:
    weights = {}
    for text in texts:
        tower, _, value = text.partition("=")
        if tower in weights:
            raise AntgmmError(f"--weigh names {tower} twice: name it once")
        try:
            weights[tower] = float(value)
        except ValueError:
            raise AntgmmError(f"--weigh {text!r}: write it as in --weigh vision=2") from None
    return weights


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
        for name, key in (("parameters", "params"), ("FLOPs per request", "flops"))
    ]
    for name, key in (("predicted latency", "predicted_ms"), ("measured latency", "measured_ms")):
        if key in student:
            shown = [f"{model[key]:.2f} ms" if key in model else "" for model in (teacher, student)]
            ratio = f"{teacher[key] / student[key]:.1f}x" if key in teacher else ""
            rows.append((name, *shown, ratio))
    request = figures["request"]
    yield table(["", "teacher", "student", ""], rows, f"A request of {request['length']} + {request['answer']} tokens")
    if "tried" in figures:
        latencies = "; ".join(f"{each['predicted_ms']:.2f} / {each['measured_ms']:.2f}" for each in figures["tried"])
        machine = figures["machine"]
        yield f"milliseconds predicted / measured: {latencies}"
        yield f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}: other load increases latency"


def recipe(stages: Mapping[str, Mapping[str, int]]) -> str:
    """Formats sizes as stages of a recipe.

    Args:
        stages: stage -> axis -> units.

    Returns:
        TOML.
    """
    parts = []
    for stage, axes in stages.items():
        listed = ", ".join(f'"{axis}" = {n}' for axis, n in axes.items())
        parts.append(f'[[stage]]\nname = "{stage}"\nsizes = {{ {listed} }}\n')
    return "\n".join(parts)


COMMANDS = {"search": (search, "antgmm search --preset antgmm-deep --params 600000 --size vision/layers=4")}
