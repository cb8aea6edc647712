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
        str, typer.Option(help="The preset that is trained; without it the model itself, as the first stage finds it.")
    ] = "",
    mesh: Annotated[
        str, typer.Option("--mesh", metavar="AXIS=N,...", help="Devices to plan for, by data, fsdp and tensor.")
    ] = "fsdp=8",
    batch: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = 256,
    length: Annotated[
        int, typer.Option(min=0, help="Prompt tokens of a sample, the image's included; 0: 128, or the image's and 64.")
    ] = 0,
    answer: Annotated[int, typer.Option(min=1, help="Its answer tokens.")] = 48,
    remat: Annotated[
        Remat, typer.Option(help="What the student's layers keep for the backward pass: all, matrix products, inputs.")
    ] = "dots",
    chip: Annotated[str, typer.Option(help="v5e, v5p, v6e, H100 or H200: a plan that it cannot hold is refused.")] = "",
    as_json: Json = False,
) -> None:
    """Tell memory, FLOPs, collectives and time at the roofline of a distillation step on devices that are not here."""
    say(f"plan: compiling a training step of {name_of(model, preset)} for {mesh}")
    from antgmm_jax.presets import preset as named
    from experiments.lab.planning import step as planning
    from experiments.lab.planning.chips import CHIPS
    from experiments.run.host.meshes import parse, simulate

    if chip and chip not in CHIPS:
        raise AntgmmError(f"--chip {chip}: choose one of {', '.join(CHIPS)}")
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, **parse(mesh)}
    if math.prod(sizes.values()) > planning.DEVICES:
        raise AntgmmError(f"--mesh {mesh}: plans are made for at most {planning.DEVICES} devices")
    # Before the model is read: an array, or the description of one, starts JAX with the devices that are there.
    simulate(planning.DEVICES)
    teacher = config_of(model, preset)
    length = length or max(128, teacher.image_tokens + 64)
    asked = planning.Asked(named(student) if student else teacher, teacher, batch, length, answer, remat)
    planning.check(asked)
    step = planning.compiled(asked, sizes)
    if chip and step.total > CHIPS[chip].memory:
        raise AntgmmError(_too_large(step, chip, planning.smallest(asked, sizes, CHIPS[chip].memory)))
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
            "yes" if found["fits"] else "no",
            *(f"{1e3 * seconds:.3g}" for seconds in found["seconds"].values()),
            f"{1e3 * max(found['seconds'].values()):.3g}",
        )
        for name, found in figures["chips"].items()
    ]
    head = ["chip", "fits", "compute", "memory", "links", "at least"]
    emit(
        figures,
        as_json,
        table(["memory of a device", ""], memory, f"A step on {_listed(step.mesh) or 'one device'}"),
        f"{count(step.flops)}FLOP a device and step",
        table(["sent by a device in a step", ""], sent),
        table(head, times, "Milliseconds of a step at the published peaks"),
        "Temporaries and what is sent are those of the CPU's compiler, which widens bfloat16: up to twice a TPU's.",
    )


def _by_operation(step: "Step") -> dict[str, int]:
    found: dict[str, int] = {}
    for (operation, _), size in step.sent.items():
        found[operation] = found.get(operation, 0) + size
    return found


def _listed(mesh: dict[str, int]) -> str:
    """A mesh as it is typed, axes of one device left out."""
    return ",".join(f"{axis}={n}" for axis, n in mesh.items() if n > 1)


def _too_large(step: "Step", chip: str, fitting: "Step | None") -> str:
    needs = f"a step takes {step.total / 1e9:.3g} GB a device, more than {chip} has"
    if fitting is None:
        return f"{needs}; no mesh of this tensor size and batch is enough: raise tensor, or lower --batch"
    enough = f"--mesh {_listed(fitting.mesh) or 'fsdp=1'} ({fitting.total / 1e9:.3g} GB)"
    return f"{needs}; the smallest mesh that is enough: {enough}"


COMMANDS = {"plan": (plan, "antgmm plan --preset antgmm-5b --mesh fsdp=16,tensor=4 --batch 256 --chip v5e")}
