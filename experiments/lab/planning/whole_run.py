"""The plan of a whole run: phases until one does not fit, and what would make it fit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.headers import describe
from antgmm_jax.presets import preset
from antgmm_jax.pure import abstract
from experiments.lab.planning.chips import CHIPS
from experiments.lab.planning.phase import Load, Phase
from experiments.lab.planning.phases import CHECK, REPORT, phases
from experiments.lab.planning.step import DEVICES, compiled, smallest
from experiments.run.narrow import Narrow, narrow_of, narrow_of_stage
from experiments.run.schema import Recipe, Training
from experiments.run.schema.recipe import load_recipe, load_training, read_toml
from experiments.run.student import config_of, cut_record
from experiments.run.training import shape_of

HEAD = ("phase", "stays", "more", "host", "disk", "sent", "least s", "by")
"""Columns of the table: GB that stay on each device, GB of temporaries, GB on a machine, GB on disk, GB that each
device sends, seconds at least, and whether memory is that of a program or arithmetic."""


class Opened(NamedTuple):
    """A recipe, and what a plan needs to know of its models.

    Attributes:
        recipe: the recipe.
        config: config of the teacher, or of the model that is trained.
        start: config of the initial model: that of the recipe's parent, or `config`.
        narrow: parameters of the initial model that are stored in two bytes.
    """

    recipe: Recipe | Training
    config: LMMConfig
    start: LMMConfig
    narrow: Narrow


def opened(path: Path, overrides: Sequence[str], instead: str = "") -> Opened:
    """Reads a recipe, and configs and dtypes of its models; no weights are read.

    Args:
        path: a TOML file.
        overrides: as in `load_recipe`.
        instead: preset for the teacher and the initial model, if they do not exist yet; "" for the recipe's. Its
            parameters are stored in the dtype in which the recipe computes.

    Raises:
        AntgmmError: the recipe, the model or the parent cannot be read.
    """
    load = load_training if "phase" in read_toml(path, "recipe") else load_recipe
    recipe: Recipe | Training = load(path, overrides)
    if instead:
        config = preset(instead)
        files = "float32" if isinstance(recipe, Training) and not recipe.start else recipe.optimizer.dtype
        params = abstract(config, jnp.dtype(files))
    elif isinstance(recipe, Training) and not recipe.start:
        config = shape_of(recipe)
        return Opened(recipe, config, config, {})  # new parameters
    else:
        config, params = describe(recipe.teacher.path if isinstance(recipe, Recipe) else recipe.start)
    if not isinstance(recipe, Recipe) or not recipe.parent or instead:
        return Opened(recipe, config, config, narrow_of(params))
    parent = Path(recipe.parent)
    return Opened(recipe, config, config_of(parent, cut_record(parent)), narrow_of_stage(parent))


def planned(made: Opened, load: Load, chip: str, say: Callable[[str], None]) -> Iterator[Phase]:
    """Plans the phases of a run.

    Args:
        made: result of `opened`.
        load: devices and rows.
        chip: chip with the memory that the phases must fit into; "" for any.
        say: called with a line for each phase.

    Yields:
        The phases.

    Raises:
        AntgmmError: a phase without which a run does not go on does not fit; the message names what does.
    """
    for phase in phases(made.recipe, made.config, load, made.start):
        say(f"plan: {phase.name}: {phase.total / 1e9:.3g} GB on each device")
        yield phase
        if chip and phase.total > CHIPS[chip].memory:
            needs = f"{phase.name} needs {phase.total / 1e9:.3g} GB per device, more than {chip} has"
            if phase.name == REPORT:  # as in `latencies`
                say(f"plan: {needs}: it will say of its times that they are not measured")
                continue
            raise AntgmmError(f"{needs}; {_remedy(phase, load, chip)}{_shorter(phase, load)}")


def _remedy(phase: Phase, load: Load, chip: str) -> str:
    memory = CHIPS[chip].memory
    if phase.name == CHECK:
        return "it runs on one device, so no mesh helps: choose a chip with more memory for it"
    if phase.spec is None:
        mesh = dict(load.mesh)
        while phase.total * load.devices > memory * mesh["data"] * mesh["fsdp"] * mesh["tensor"]:
            mesh["fsdp"] *= 2
        return f"about --mesh {_listed(mesh)} is sufficient"
    if phase.spec.remat != "full":
        step = compiled(phase.spec._replace(remat="full"), load.mesh, load.chip)
        if step.total <= memory:
            return f'optimizer.remat = "full" is sufficient ({step.total / 1e9:.3g} GB)'
    step = smallest(phase.spec, load.mesh, memory, load.chip)
    if step is None:
        return f"no mesh of at most {DEVICES} devices with this tensor size and batch is sufficient"
    return f"the smallest sufficient mesh is --mesh {_listed(step.mesh)} ({step.total / 1e9:.3g} GB)"


def _shorter(phase: Phase, load: Load) -> str:
    """How to plan shorter rows: those of a recipe are as long as it allows. Loading has no rows."""
    if phase.name == "loading":
        return ""
    return f"; if your longest row has fewer than {load.length} + {load.answer} tokens, give --length and --answer"


def _listed(mesh: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={n}" for axis, n in mesh.items() if n > 1) or "fsdp=1"


def figures(plan: Sequence[Phase], chip: str, devices: int) -> list[dict[str, Any]]:
    """Converts phases to JSON types, with the least time on a number of devices if a chip is given."""
    return [
        {
            "phase": phase.name,
            "memory": {**phase.memory, "total": phase.total},
            "host": phase.host,
            "disk": phase.disk,
            "sent": phase.sent,
            "flops": phase.flops,
            "seconds": phase.least(chip, devices) if chip and phase.flops else None,
            "compiled": phase.compiled,
        }
        for phase in plan
    ]


def rows(table: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Formats `figures` as rows with the columns `HEAD`."""
    for each in table:
        temporaries = each["memory"].get("temporaries", 0)
        sizes = (each["memory"]["total"] - temporaries, temporaries, each["host"], each["disk"], each["sent"])
        shown = [f"{size / 1e9:.3g}" if size else "" for size in sizes]
        seconds = "" if each["seconds"] is None else f"{each['seconds']:.3g}"
        yield (each["phase"], *shown, seconds, "program" if each["compiled"] else "sum")
