"""Steps on several machines, planned one after another: the table of docs/lab/cluster.md."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete, violations
from antgmm_jax.io.files import read_json
from antgmm_jax.presets import preset
from experiments.lab.planning.chips import CHIPS
from experiments.lab.planning.step import StepSpec, check, compiled, roofline
from experiments.run.files import write_json, write_text
from experiments.run.host.console import say
from experiments.run.markdown import markdown_table
from experiments.run.schema.recipe import read_toml
from pruning.costs import total_parameters
from pruning.planning import variants

CASES = Path(__file__).with_name("plans.toml")
HEAD = (
    "step",
    "machine",
    "fits",
    "GB that stay",
    "GB of temporaries",
    "GB sent",
    "at least ms",
    "estimated ms",
    "of it links ms",
    "share",
)


class Case(NamedTuple):
    """A distillation step that is planned for several machines.

    Attributes:
        name: its name.
        spec: the step, with the batch of up to 16 devices.
    """

    name: str
    spec: StepSpec

    def on(self, devices: int) -> StepSpec:
        """Returns the step with the batch for a number of devices."""
        return self.spec._replace(batch=self.spec.batch * max(1, devices // 16))


def load(path: Path = CASES) -> tuple[list[Case], list[tuple[str, int]]]:
    """Reads cases.

    Args:
        path: a TOML file.

    Returns:
        The cases, and the machines as (chip, number of chips).

    Raises:
        AntgmmError: a preset, an axis or a machine does not exist, or sizes are not legal.
    """
    table = read_toml(path, "table of plans")
    return [_case(each) for each in table["case"]], [machine(name) for name in table["machines"]]


def machine(name: str) -> tuple[str, int]:
    """Parses a machine.

    Args:
        name: CHIP-COUNT, such as "v5e-16".

    Returns:
        Chip and number of chips.

    Raises:
        AntgmmError: there is no such chip.
    """
    chip, _, count = name.partition("-")
    if chip not in CHIPS or not count.isdecimal():
        raise AntgmmError(f"machine {name!r}: write it as CHIP-COUNT, with one of {', '.join(CHIPS)}")
    return chip, int(count)


def _case(table: Mapping[str, Any]) -> Case:
    teacher = _resized(preset(table["preset"]), table.get("teacher", {}))
    base = preset(table["student_preset"]) if "student_preset" in table else teacher
    student = _resized(base, table.get("student", {}))
    rows, length, answer = (table[key] for key in ("rows", "length", "answer"))
    spec = StepSpec(student, teacher, rows, length, answer, table.get("remat", "dots"))
    check(spec)
    return Case(table["name"], spec)


def _resized(config: LMMConfig, wanted: Mapping[str, int]) -> LMMConfig:
    [*legal] = [each for each in variants(config, complete(config, wanted)) if not violations(each)]
    if not legal:
        raise AntgmmError(f"no legal model has the sizes {dict(wanted)}")
    return legal[0]


def run(
    out: Path, cases: Sequence[Case], machines: Sequence[tuple[str, int]], *, again: bool = False
) -> dict[str, Any]:
    """Plans cases on machines with the chips' compilers; plans in the file are kept.

    Args:
        out: JSON file, written after each plan, with its table beside it.
        cases: the cases.
        machines: chips and their numbers.
        again: whether to replace plans of the file.

    Returns:
        Content of the file: "case on chip-count" -> figures.

    Raises:
        AntgmmError: a batch is not divisible by the number of chips, or the file is damaged.
    """
    figures: dict[str, Any] = read_json(out, "remove it and run it again") if out.exists() else {}
    for chip, count in machines:
        for case in cases:
            name = f"{case.name} on {chip}-{count}"
            if name in figures and not again:
                continue
            say(f"plans: {name}")
            begin = time.monotonic()
            figures[name] = {**planned(case.on(count), chip, count), "seconds": round(time.monotonic() - begin)}
            write_json(out, figures)
            write_text(out.with_suffix(".md"), markdown(figures))
    return figures


def markdown(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Formats plans as a Markdown table."""
    return markdown_table(HEAD, rows(figures), texts=2) + "\n"


def planned(spec: StepSpec, chip: str, count: int) -> dict[str, Any]:
    """Plans a step on a number of chips, all of them on `fsdp`.

    Args:
        spec: the step.
        chip: a key of `CHIPS`.
        count: number of chips.

    Returns:
        Figures as JSON types.
    """
    step = compiled(spec, {"data": 1, "fsdp": count, "tensor": 1}, chip)
    refused = not step.sent and count > 1
    return {
        "batch": spec.batch,
        "parameters": [total_parameters(model) for model in (spec.teacher, spec.student) if model],
        "student": sizes(spec.student),
        "memory": step.memory,
        "fits": step.total <= CHIPS[chip].memory,
        "sent": sum(step.sent.values()),
        "flops": step.flops,
        "least": None if refused else max(roofline(step, CHIPS[chip]).values()),
        "estimated": step.estimated,
        "links": step.waits,
        "share": step.share,
        "cycles": dict(step.cycles.most_common(12)),
    }


def rows(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Formats plans as rows of a table with the columns `HEAD`."""
    for name, each in figures.items():
        memory, fits = each["memory"], "yes" if each["fits"] else "no"
        stays = sum(size for kind, size in memory.items() if kind != "temporaries")
        sizes_ = [f"{size / 1e9:.3g}" for size in (stays, memory["temporaries"], each["sent"])]
        times = ["" if each[key] is None else f"{1e3 * each[key]:.0f}" for key in ("least", "estimated", "links")]
        share = "" if each["share"] is None else f"{each['share']:.2f}"
        yield (*name.split(" on "), fits, *sizes_, *times, share)
