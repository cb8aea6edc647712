"""The command that plans a run for a cluster."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from antgmm_jax.config import Remat
from antgmm_jax.errors import AntgmmError
from data.limits import LONGEST_ANSWER, MOST_TOKENS
from experiments.commands.output import Json, Maybe, Preset, Set, emit
from experiments.commands.sources import config_of, name_of, sizes_given
from experiments.run.host.console import count, say, table

if TYPE_CHECKING:
    from antgmm_jax.config import LMMConfig
    from experiments.lab.planning.step import Step

BATCH, REMAT = 256, "dots"


def plan(
    model: Maybe = None,
    preset: Preset = "",
    student: Annotated[
        str,
        typer.Option(help="Checkpoint or preset of the student; by default the model itself, as in the first stage."),
    ] = "",
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=N", help="The student's units of an axis, or a fraction. Can be repeated."),
    ] = None,
    mesh: Annotated[
        str, typer.Option("--mesh", metavar="AXIS=N,...", help="Devices to plan for, by data, fsdp and tensor.")
    ] = "fsdp=8",
    batch: Annotated[int, typer.Option(min=1, max=1 << 20, help="Samples per step.")] = BATCH,
    length: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_TOKENS,
            help="Prompt tokens per sample, including image tokens; 0 for max(128, image tokens + 64), or for the"
            " `max_length` of a recipe.",
        ),
    ] = 0,
    answer: Annotated[
        int,
        typer.Option(
            min=0, max=LONGEST_ANSWER, help="Answer tokens per sample; 0 for 48, or the `max_answer` of a recipe."
        ),
    ] = 0,
    slots: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_TOKENS,
            help="Image slots per sample: tiles of its pictures, or squares of merged patches; 0 for those of one image"
            " of the usual size.",
        ),
    ] = 0,
    remat: Annotated[
        Remat,
        typer.Option(help="What layers save for the backward pass, from all to their inputs alone."),
    ] = REMAT,
    chip: Annotated[
        str,
        typer.Option(
            help="v5e, v5p, v6e, H100 or H200: compiles with its compiler; an error if its memory is too small."
        ),
    ] = "",
    compiler: Annotated[
        Literal["own", "cpu"], typer.Option(help="cpu: compile with the CPU's compiler in place of the chip's.")
    ] = "own",
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Predict memory, communication and least time on other devices: of a step, or of a whole run from its recipe."""
    if model is not None and model.suffix == ".toml":
        given = {"--student": student, "--size": size, "--batch": batch != BATCH, "--remat": remat != REMAT}
        if unread := [option for option, value in given.items() if value]:
            raise AntgmmError(f"{model} says that itself: leave out {', '.join(unread)}, or change it with --set")
        rows = {"length": length, "answer": answer, "slots": slots or None}
        _whole_run(model, preset, mesh, rows, chip, compiler, overrides or (), as_json)
        return
    if overrides:
        raise AntgmmError("--set changes a recipe, and there is none: use --student, --size, --batch and --remat")
    say(f"plan: compiling a training step of {name_of(model, preset)} for {mesh}")
    from experiments.lab.planning import step as planning
    from experiments.lab.planning.chips import CHIPS
    from experiments.lab.planning.shapes import image_tokens

    sizes, target = _devices(mesh, chip, compiler)
    teacher = config_of(model, preset)
    length = length or max(128, image_tokens(teacher, slots or None) + 64)
    smaller = _student(student, size or (), teacher)
    request = planning.StepSpec(smaller, teacher, batch, length, answer or 48, remat, slots=slots or None)
    planning.check(request)
    step = planning.compiled(request, sizes, target)
    if chip and step.total > CHIPS[chip].memory:
        raise AntgmmError(_too_large(step, chip, planning.smallest(request, sizes, CHIPS[chip].memory, target)))
    figures = _figures(step, [chip] if chip else [*CHIPS], "own" if target else "cpu")
    emit(figures, as_json, *_shown(figures))


def _devices(mesh: str, chip: str, compiler: str) -> tuple[dict[str, int], str]:
    """Sizes of all axes of the mesh, and the chip to compile for; JAX will simulate devices, and use no real ones."""
    from experiments.lab.planning import compilers
    from experiments.lab.planning.chips import CHIPS
    from experiments.lab.planning.step import DEVICES
    from experiments.run.host.meshes import parse, simulate

    if chip and chip not in CHIPS:
        raise AntgmmError(f"--chip {chip}: choose one of {', '.join(CHIPS)}")
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, **parse(mesh)}
    if math.prod(sizes.values()) > DEVICES:
        raise AntgmmError(f"--mesh {mesh}: at most {DEVICES} devices are supported")
    target = chip if compiler == "own" else ""
    if target:
        compilers.check(target)
    # Before reading the model: any array, or even its shape, initialises JAX with the real devices.
    compilers.only_compile()
    simulate(DEVICES)
    return sizes, target


def _whole_run(
    path: Path,
    preset: str,
    mesh: str,
    rows: Mapping[str, Any],
    chip: str,
    compiler: str,
    overrides: Sequence[str],
    as_json: bool,
) -> None:
    say(f"plan: compiling the phases of {path} for {mesh}")
    from experiments.lab.planning import whole_run
    from experiments.lab.planning.chips import CHIPS
    from experiments.lab.planning.phase import Load
    from experiments.lab.planning.shapes import image_tokens

    sizes, target = _devices(mesh, chip, compiler)
    made = whole_run.opened(path, overrides, preset)
    pictures = image_tokens(made.config, rows["slots"])
    longest = rows["length"] or pictures + made.recipe.max_length, rows["answer"] or made.recipe.max_answer
    if longest[0] <= pictures:
        raise AntgmmError(f"--length {longest[0]}: the images alone take {pictures} tokens")
    memory = CHIPS[chip].memory if chip else math.inf
    load = Load(sizes, target, *longest, memory=memory, narrow=made.narrow, slots=rows["slots"])
    phases = whole_run.figures([*whole_run.planned(made, load, chip, say)], chip, load.devices)
    note = (
        "GB that stay on each device, and of temporaries; GB on a machine for copies of arrays and batches made ahead;"
        f" GB on disk; GB that a device sends. Rows have {load.length} prompt and {load.answer} answer tokens: the"
        f" recipe's longest text and answer, or --length and --answer, with {pictures} tokens of images (--slots)."
        " Sums are arithmetic, the rest compiled programs."
    )
    if target and not CHIPS[chip].slices:
        note += " Attention is compiled without cuDNN, so on a GPU that has it long rows take fewer temporaries."
    figures = {"mesh": sizes, "compiler": "own" if target else "cpu", "length": load.length, "answer": load.answer}
    title = f"{path.name} on {_listed(sizes) or 'one device'}"
    emit({**figures, "phases": phases}, as_json, table(whole_run.HEAD, whole_run.rows(phases), title), note)


def _student(student: str, sizes: Sequence[str], teacher: "LMMConfig") -> "LMMConfig":
    """Config of the student: a checkpoint, a preset, or the teacher; with the given sizes."""
    import pruning
    from antgmm_jax.axes import sizes as sizes_of
    from antgmm_jax.families import complete
    from pruning.planning import explain_illegal, illegal_reason, size_of

    config = teacher
    if student:
        config = config_of(*((Path(student), "") if _is_checkpoint(student) else (None, student)))
    present = sizes_of(config)
    wanted = {axis: size_of(axis, target, present) for axis, target in sizes_given(sizes).items()}
    if reason := illegal_reason(config, wanted):
        raise AntgmmError(explain_illegal(config, wanted, reason))
    return pruning.planned_config(config, complete(config, wanted)) if wanted else config


def _is_checkpoint(name: str) -> bool:
    return name.startswith("hf:") or Path(name).is_dir()


def _figures(step: "Step", chips: Sequence[str], compiler: str) -> dict[str, Any]:
    from experiments.lab.planning.chips import CHIPS
    from experiments.lab.planning.step import roofline

    return {
        "mesh": step.mesh,
        "compiler": compiler,
        "memory": {**step.memory, "total": step.total},
        "flops": step.flops,
        "sent": _by_operation(step),
        "chips": {
            name: {
                "fits": step.total <= CHIPS[name].memory,
                "seconds": roofline(step, CHIPS[name]),
                "estimated": step.estimated,
                "waits": step.waits,
                "share": step.share,
                "source": CHIPS[name].source,
            }
            for name in chips
        },
    }


def _shown(figures: Mapping[str, Any]) -> Iterator[Any]:
    def rows(kind: str) -> list[tuple[str, str]]:
        return [(name, f"{size / 1e9:.3g} GB") for name, size in figures[kind].items()]

    yield table(["memory per device", ""], rows("memory"), f"A step on {_listed(figures['mesh']) or 'one device'}")
    yield f"{count(figures['flops'])}FLOP per device and step"
    yield table(["sent per device and step", ""], rows("sent"))
    head = ["chip", "fits", "compute", "memory", "links", "at least"]
    times = []
    for name, chip in figures["chips"].items():
        bounds = [*chip["seconds"].values(), max(chip["seconds"].values())]
        times.append((name, "yes" if chip["fits"] else "no", *(f"{1e3 * each:.3g}" for each in bounds)))
    yield table(head, times, "Milliseconds per step at published peak rates")
    for name, chip in figures["chips"].items():
        if chip["estimated"] is not None:
            estimated, waits = (f"{1e3 * chip[key]:.3g} ms" for key in ("estimated", "waits"))
            yield f"Estimated for {name}: {estimated}, {waits} of it for links; {chip['share']:.2f} of the chip's peak."
    if figures["compiler"] == "cpu":
        yield (
            "Compiled with the CPU's compiler, which widens bfloat16: temporaries and communication are up to twice"
            " those of an accelerator. With --chip the chip's own compiler is used."
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
        remedy = "increase tensor, or reduce --batch, --length or --answer"
        return f"{needs}; no mesh with this tensor size and batch is sufficient: {remedy}"
    enough = f"--mesh {_listed(fitting.mesh) or 'fsdp=1'} ({fitting.total / 1e9:.3g} GB)"
    return f"{needs}; the smallest sufficient mesh is {enough}"


COMMANDS = {
    "plan": (
        plan,
        "antgmm plan --preset antgmm-5b --mesh fsdp=16,tensor=4 --batch 256 --chip v5e, or"
        " antgmm plan recipe.toml --mesh fsdp=8 --chip H100",
    )
}
