"""The command that plans a run for a cluster."""

import math
from typing import TYPE_CHECKING, Annotated

import typer

from antgmm_jax.config import Remat
from antgmm_jax.errors import AntgmmError
from experiments.commands.output import Json, Maybe, Preset, emit
from experiments.commands.sources import config_of, name_of
from experiments.run.host.console import count, say, table

if TYPE_CHECKING:
    from experiments.lab.planning.step import Step


def plan(
    model: Maybe = None,
    preset: Preset = "",
    student: Annotated[
        str, typer.Option(help="Preset of the student; by default the model itself, as in the first stage.")
    ] = "",
    mesh: Annotated[
        str, typer.Option("--mesh", metavar="AXIS=N,...", help="Devices to plan for, by data, fsdp and tensor.")
    ] = "fsdp=8",
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 256,
    length: Annotated[
        int,
        typer.Option(
            min=0, help="Prompt tokens per sample, including image tokens; 0 for max(128, image tokens + 64)."
        ),
    ] = 0,
    answer: Annotated[int, typer.Option(min=1, help="Answer tokens per sample.")] = 48,
    remat: Annotated[
        Remat, typer.Option(help="What the student's layers save for the backward pass: all, matrix products, inputs.")
    ] = "dots",
    chip: Annotated[str, typer.Option(help="v5e, v5p, v6e, H100 or H200; an error if its memory is too small.")] = "",
    as_json: Json = False,
) -> None:
    """Predict memory, FLOPs, communication and roofline time of a distillation step on other devices."""
    say(f"plan: compiling a training step of {name_of(model, preset)} for {mesh}")
    from antgmm_jax.presets import preset as named
    from experiments.lab.planning import step as planning
    from experiments.lab.planning.chips import CHIPS
    from experiments.run.host.meshes import parse, simulate

    if chip and chip not in CHIPS:
        raise AntgmmError(f"--chip {chip}: choose one of {', '.join(CHIPS)}")
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, **parse(mesh)}
    if math.prod(sizes.values()) > planning.DEVICES:
        raise AntgmmError(f"--mesh {mesh}: at most {planning.DEVICES} devices are supported")
    # Before reading the model: any array, or even its shape, initialises JAX with the real devices.
    simulate(planning.DEVICES)
    teacher = config_of(model, preset)
    length = length or max(128, teacher.usual_tokens + 64)
    request = planning.StepSpec(named(student) if student else teacher, teacher, batch, length, answer, remat)
    planning.check(request)
    step = planning.compiled(request, sizes)
    if chip and step.total > CHIPS[chip].memory:
        raise AntgmmError(_too_large(step, chip, planning.smallest(request, sizes, CHIPS[chip].memory)))
    chips = {name: CHIPS[name] for name in ([chip] if chip else CHIPS)}
    figures = {
        "mesh": step.mesh,
        "memory": {**step.memory, "total": step.total},
        "flops": step.flops,
        "sent": _by_operation(step),
        "chips": {
            name: {
                "fits": step.total <= each.memory,
                "seconds": planning.roofline(step, each),
                "source": each.source,
            }
            for name, each in chips.items()
        },
    }
    memory = [(kind, f"{size / 1e9:.3g} GB") for kind, size in figures["memory"].items()]
    sent = [(name, f"{size / 1e9:.3g} GB") for name, size in figures["sent"].items()]
    times = [
        (
            name,
            "yes" if figures_of_chip["fits"] else "no",
            *(f"{1e3 * seconds:.3g}" for seconds in figures_of_chip["seconds"].values()),
            f"{1e3 * max(figures_of_chip['seconds'].values()):.3g}",
        )
        for name, figures_of_chip in figures["chips"].items()
    ]
    head = ["chip", "fits", "compute", "memory", "links", "at least"]
    emit(
        figures,
        as_json,
        table(["memory per device", ""], memory, f"A step on {_listed(step.mesh) or 'one device'}"),
        f"{count(step.flops)}FLOP per device and step",
        table(["sent per device and step", ""], sent),
        table(head, times, "Milliseconds per step at published peak rates"),
        "Temporaries and communication are those of the CPU compiler, which widens bfloat16: up to twice a TPU's.",
    )


def _by_operation(step: "Step") -> dict[str, int]:
    sizes: dict[str, int] = {}
    for (operation, _), size in step.sent.items():
        sizes[operation] = sizes.get(operation, 0) + size
    return sizes


def _listed(mesh: dict[str, int]) -> str:
    """Formats a mesh like the option --mesh, without axes of size 1."""
    return ",".join(f"{axis}={n}" for axis, n in mesh.items() if n > 1)


def _too_large(step: "Step", chip: str, fitting: "Step | None") -> str:
    needs = f"a step needs {step.total / 1e9:.3g} GB per device, more than {chip} has"
    if fitting is None:
        return f"{needs}; no mesh with this tensor size and batch is sufficient: increase tensor, or reduce --batch"
    enough = f"--mesh {_listed(fitting.mesh) or 'fsdp=1'} ({fitting.total / 1e9:.3g} GB)"
    return f"{needs}; the smallest sufficient mesh is {enough}"


COMMANDS = {"plan": (plan, "antgmm plan --preset antgmm-5b --mesh fsdp=16,tensor=4 --batch 256 --chip v5e")}
