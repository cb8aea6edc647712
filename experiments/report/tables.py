"""Texts and tables of the report, for Markdown and HTML."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.report.latency import Latency
from experiments.report.savings import kwh_a_year
from experiments.report.sentences import Report, assumed, engines, saved, scored, timed, trained
from experiments.run.host.console import count

NOT_MEASURED = "not measured"


class Table(NamedTuple):
    """A table of text cells. The first column is the row's name; the others are numbers, unless `prose` is set."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False


class Section(NamedTuple):
    """A section of the report: heading, explanation and table."""

    key: str
    title: str
    text: str
    table: Table


def provenance(report: Report) -> list[tuple[str, str]]:
    """Returns name and value of facts about the run and the machine."""
    machine = report["machine"]
    return [
        ("Measured on", f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}"),
        ("JAX device", machine["device"]),
        ("System", machine["system"]),
        ("Seed", str(report["seed"])),
        ("Recipe", report["recipe"]),
        ("Wall time of this run alone, including interrupted attempts", f"{report['wall_seconds']:.0f} s"),
    ]


def sections(report: Report) -> list[Section]:
    """Returns the sections of the report in order.

    Args:
        report: contents of `report.json`.

    Returns:
        The sections; hard records have one only if they were scored.
    """
    slices = _slices(report)
    result = [
        Section("models", "Teacher and student", scored(report), _models(report)),
        Section("stages", "Stages", trained(report), _stages(report)),
        Section("towers", "Parameters by tower", "", _towers(report)),
        *(_requests_sections(report) if engines(report) else ()),
        Section("compression", "Energy of the compression", assumed(report), _compression(report)),
        Section("types", "Exact match by question type", "", _types(report)),
    ]
    if slices:
        text = "Macro exact match on the hard records, by the property that does not occur in training."
        result.append(Section("slices", "Exact match by hard slice", text, slices))
    return result


def _requests_sections(report: Report) -> list[Section]:
    """Sections about requests that were timed."""
    return [
        Section("latency", "Latency of a request", timed(report), _latency(report)),
        Section("energy", "Energy of a request", saved(report), _requests(report)),
    ]


def answers(report: Report) -> Table:
    """Returns the table of example questions with the correct answer and those of both models."""
    head = ["question", "right answer", "teacher", "student"]
    rows = [
        [
            f"{e['question']} ({e['type']})" if e["type"] else e["question"],
            e["answer"],
            *(f"{mark(e[f'{name}_right'])} {e[name]}" for name in ("teacher", "student")),
        ]
        for e in report["examples"]
    ]
    return Table(head, rows, prose=True)


def mark(right: bool) -> str:
    """Returns a sign for right or wrong answers."""
    return "✓" if right else "✗"


def models(report: Report) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns name and figures of the teacher, of each stage's student and of the export."""
    stages = [(stage["name"], stage) for stage in report["stages"]]
    return [("teacher", report["teacher"]), *stages, ("export", report["student"])]


def latencies(report: Report, engine: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns name and latency of every model that was measured in an engine, in the order of `models`."""
    times = report["latency"][engine]
    stages = [(stage["name"], stage["latency"]) for stage in report["stages"]] if engine == "jax" else []
    return [("teacher", times["teacher"]), *stages, ("export", times["student"])]


def _models(report: Report) -> Table:
    teacher, student, latency = report["teacher"], report["student"], report["latency"]
    towers = teacher["params_by_tower"].items()
    rows = [
        _ratio("parameters", teacher["params"], student["params"]),
        *(_ratio(f"… {tower}", size, student["params_by_tower"][tower]) for tower, size in towers),
        _ratio("FLOPs per request", teacher["flops"], student["flops"]),
        _points("exact match (macro)", teacher["exact_match"], student["exact_match"]),
    ]
    if "exact_match_hard" in teacher:
        rows.append(_points("… on hard records", teacher["exact_match_hard"], student["exact_match_hard"]))
    names = {"final_token": "final token", "rouge_l": "ROUGE-L", "verdict_f1": "verdict F1"}
    for key, name in names.items():
        if key in teacher["scores"]:
            rows.append(_points(name, teacher["scores"][key], student["scores"][key]))
    if "token_loss" in teacher["scores"]:
        rows.append(_losses(teacher["scores"]["token_loss"], student["scores"]["token_loss"]))
    for engine, name in engines(report).items():
        times = latency[engine]
        rows.append(_ratio(f"{name} request, p50", times["teacher_ms"], times["student_ms"], _milliseconds))
    if not engines(report):
        rows.append(["latency of a request", *[NOT_MEASURED] * 2, "-"])
    return Table(["figure", "teacher", "student", "change"], rows)


def _ratio(name: str, old: float, new: float, form: Any = count) -> list[str]:
    return [name, form(old), form(new), f"{old / new:.1f}x" if new else "-"]


def _points(name: str, old: float, new: float) -> list[str]:
    return [name, f"{old:.4f}", f"{new:.4f}", f"{100 * (new - old):+.1f} points"]


def _losses(old: float | None, new: float | None) -> list[str]:
    """The row of token losses; None stands for a loss that is not finite."""
    change = "-" if old is None or new is None else f"{new - old:+.4f} nats"
    return ["token loss of the right answers", *("not finite" if x is None else f"{x:.4f}" for x in (old, new)), change]


def _milliseconds(value: float) -> str:
    return f"{value:.2f} ms"


def _stages(report: Report) -> Table:
    head = ["model", "parameters", "FLOPs", "exact match", "JAX p50", "loss", "seconds"]
    times = [_milliseconds(latency["p50"]) for _, latency in latencies(report, "jax")] if engines(report) else []
    rows = [
        [
            name,
            count(figures["params"]),
            count(figures["flops"]),
            f"{figures['exact_match']:.4f}",
            times[place] if times else NOT_MEASURED,
            _loss(figures),
            f"{figures['energy']['seconds']:.0f}" if "energy" in figures else "-",
        ]
        for place, (name, figures) in enumerate(models(report))
    ]
    return Table(head, rows)


def _loss(figures: Mapping[str, Any]) -> str:
    if figures.get("loss_first") is None:
        return "-"
    return f"{figures['loss_first']:.3f} → {figures['loss_last']:.3f}"


def _towers(report: Report) -> Table:
    columns = models(report)
    towers = report["teacher"]["params_by_tower"]
    rows = [[tower, *(count(figures["params_by_tower"][tower]) for _, figures in columns)] for tower in towers]
    return Table(["tower", *(name for name, _ in columns)], rows)


def _latency(report: Report) -> Table:
    rows = [
        [f"{name} {model}", *(f"{times[field]:.2f}" for field in Latency._fields), str(times["rounds"])]
        for engine, name in engines(report).items()
        for model, times in latencies(report, engine)
    ]
    return Table(["model", *Latency._fields, "rounds"], rows)


def _requests(report: Report) -> Table:
    rates = list(report["energy"]["saved"]["jax"]["kwh_a_year"])
    rows = []
    for engine, name in engines(report).items():
        for model, times in latencies(report, engine):
            energy = times["energy"]
            years = [count(kwh_a_year(energy["joules"], float(rate))) for rate in rates]
            rows.append([f"{name} {model}", f"{energy['joules']:.3g}", energy["source"], *years])
    return Table(["model", "J per request", "source", *(f"kWh per year at {rate}/s" for rate in rates)], rows)


def _compression(report: Report) -> Table:
    used = [(f"stage {stage['name']}", stage["energy"]) for stage in report["stages"]]
    if "cache" in report["energy"]:
        used.insert(0, ("teacher cache", report["energy"]["cache"]))
    rows = [
        [
            name,
            f"{energy['kwh']:.3g}",
            f"{energy['kg_co2']:.3g}",
            f"{energy['seconds']:.0f}",
            *(f"{energy[f'{part}_watts']:.3g}" for part in ("cpu", "gpu", "ram")),
            energy["source"],
        ]
        for name, energy in [*used, ("whole run", report["energy"]["run"])]
    ]
    return Table(["part", "kWh", "kg CO2", "seconds", "CPU W", "GPU W", "memory W", "source"], rows)


def _types(report: Report) -> Table:
    columns = models(report)
    types = sorted(report["teacher"]["scores"]["by_type"])
    rows = [[kind or "-", *(f"{figures['scores']['by_type'][kind]:.3f}" for _, figures in columns)] for kind in types]
    return Table(["question type", *(name for name, _ in columns)], rows)


def _slices(report: Report) -> Table | None:
    pair = [report[name].get("scores_hard", {}).get("by_slice", {}) for name in ("teacher", "student")]
    rows = [_points(name or "-", pair[0][name], pair[1][name]) for name in sorted(pair[0])]
    return Table(["slice", "teacher", "export", "change"], rows) if rows else None
