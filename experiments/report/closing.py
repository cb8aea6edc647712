"""The summary that a command prints at the end of a run."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from experiments.report.sentences import quality, up_to_ties
from experiments.report.tables import NOT_MEASURED
from experiments.run.host.console import count, table


def summary(figures: Mapping[str, Any]) -> Table:
    """Builds a table that compares teacher and student.

    Args:
        figures: report of a run.

    Returns:
        A table for the terminal.
    """
    teacher, student, latency = figures["teacher"], figures["student"], figures["latency"]

    def row(name: str, old: float, new: float, form: Any = count) -> tuple[str, ...]:
        return name, form(old), form(new), f"{old / new:.1f}x"

    def milliseconds(value: float) -> str:
        return f"{value:.1f} ms"

    def joules(value: float) -> str:
        return f"{value:.3g} J"

    rows = [
        row("parameters", teacher["params"], student["params"]),
        row("FLOPs per request", teacher["flops"], student["flops"]),
    ]
    for engine, name in (("jax", "JAX"), ("torch", "PyTorch")):
        if engine in latency:
            times = latency[engine]
            rows.append(row(f"latency in {name}", times["teacher_ms"], times["student_ms"], milliseconds))
            energy = [times[model]["energy"] for model in ("teacher", "student")]
            name = f"energy per request in {name}, {energy[0]['source']}"
            rows.append(row(name, energy[0]["joules"], energy[1]["joules"], joules))
    if "jax" not in latency:
        rows.append(("latency", *[NOT_MEASURED] * 2, ""))
    measure = "ROUGE-L" if figures["free_text"] else "exact match (macro)"
    for records, name in (("", measure), ("_hard", "... on hard records")):
        if f"exact_match{records}" in teacher:
            old, new = (quality(figures, model, records) for model in ("teacher", "student"))
            rows.append((name, f"{old:.4f}", f"{new:.4f}", f"{100 * (new - old):+.1f} points"))
    gate = figures["export"]
    verdict = f"{100 * gate['answers_equal']:.0f} % of {gate['prompts']} answers equal{up_to_ties(gate)}"
    rows.append(("export loaded by transformers", "", "passed" if gate["passed"] else "failed", verdict))
    return table(["", "teacher", "student", ""], rows)
