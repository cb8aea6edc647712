"""Sentences of the report, for its pages and for the terminal."""

from collections.abc import Mapping
from typing import Any

from experiments.run.host.console import count

Report = Mapping[str, Any]
"""Contents of `report.json`."""

ENGINES = {"jax": "JAX", "torch": "PyTorch"}


def headline(report: Report) -> str:
    """Summarises the run in one sentence."""
    ratios, lost = report["ratios"], 100 * (quality(report, "teacher") - quality(report, "student"))
    latency = " and ".join(
        f"{_fold(ratios[engine], 'lower', 'higher')} {'latency ' if engine == 'jax' else ''}in {name}"
        for engine, name in engines(report).items()
    )
    size = f"{_fold(ratios['params'], 'fewer', 'more')} parameters"
    measure = "ROUGE-L" if report["free_text"] else "macro exact match"
    points = f"{abs(lost):.1f} points of {measure} {'lost' if lost >= 0 else 'gained'}"
    return ", ".join(filter(None, [size, latency, points])) + "."


def quality(report: Report, model: str, records: str = "") -> float:
    """Returns the score that says most about a model: exact match, or ROUGE-L of free text.

    Args:
        report: contents of `report.json`.
        model: "teacher" or "student".
        records: "" for the test records, "_hard" for the hard ones.
    """
    figures = report[model]
    return figures[f"scores{records}"]["rouge_l"] if report["free_text"] else figures[f"exact_match{records}"]


def up_to_ties(export: Mapping[str, Any]) -> str:
    """Returns how many equal answers of the export gate differ after a tie, in brackets; "" for none."""
    return f" ({export['ties']} of them up to a tie)" if export["ties"] else ""


def engines(report: Report) -> dict[str, str]:
    """Returns key and name of the engines that were measured: none if the recipe leaves latency out or the teacher does
    not fit on one device, and PyTorch only with a device like JAX's.
    """
    return {engine: name for engine, name in ENGINES.items() if engine in report["latency"]}


def _fold(ratio: float, less: str, more: str) -> str:
    return f"{ratio:.1f}x {less}" if ratio >= 1 else f"{1 / ratio:.1f}x {more}"


def export_gate(report: Report) -> str:
    """Describes the result of the export gate."""
    export = report["export"]
    note = (
        f"; large differences were checked in float64: PyTorch's float32 is off by up to {export['torch_rounding']:.2g}"
        if export["torch_rounding"]
        else ""
    )
    return (
        f"Stock transformers, with the exported files in float32: logits differ by at most"
        f" {export['max_abs_logit_diff']:.2g} (largest magnitude {export['max_abs_logit']:.3g}{note}),"
        f" {100 * export['answers_equal']:.1f} % of {export['prompts']} greedy answers have equal tokens"
        f"{up_to_ties(export)}."
    )


def scored(report: Report) -> str:
    """Explains the scores of teacher and student."""
    tested = f"{report['teacher']['scores']['count']} test records"
    if "scores_hard" in report["teacher"]:
        tested += f" and {report['teacher']['scores_hard']['count']} hard ones"
    text = f"The student is the exported model, loaded from its files. Scores are on {tested}."
    if report["choices"]:
        listed = "; ".join(report["choices"])
        text += f" The test records also took part in choices, so scores on other records may be lower: {listed}."
    return text


def trained(report: Report) -> str:
    """Explains the figures of stages, which are not of files as those of the export are."""
    text = (
        "Size and quality of the student after each stage are of its parameters as trained, those of the export of its"
        " files."
    )
    if not engines(report):
        return text
    dtype = report["latency"]["dtype"]
    return f"{text} Latency is the median of a request in JAX in {dtype}, measured one model at a time."


def timed(report: Report) -> str:
    """Explains the latency of a request."""
    request = report["latency"]
    return (
        f"Milliseconds at batch 1 in {request['dtype']}, of the test record that is nearest to the median prompt"
        f" ({request['prompt']} tokens, {request['slots']} image slots) with {request['tokens']} answer tokens; medians"
        " for phases, over a number of rounds. They are of the model only, without reading and resizing pictures and"
        " without tokenizing. PyTorch uses the number of threads that is fastest for each model."
    )


def saved(report: Report) -> str:
    """Explains the energy of requests, and states when the run has paid off."""
    savings = []
    for engine, name in engines(report).items():
        figures = report["energy"]["saved"][engine]
        repaid = "never repaid" if figures["payback"] is None else f"repaid after {count(figures['payback'])} requests"
        savings.append(f"{figures['joules']:.3g} J per request in {name} (energy of the run {repaid})")
    return (
        "Energy of the whole machine, including idle power, for consecutive requests. A year is 365 days at the given"
        " rate, on as many fully used machines as necessary. The"
        f" export saves {', and '.join(savings)}."
    )


def assumed(report: Report) -> str:
    """Explains the energy of the run, with its assumptions."""
    return (
        "Energy of the whole machine, including interrupted attempts. Stages include their evaluation, the run includes"
        " the measurements of this report. A plan, a parent run and other students of a search are not included."
        f" {'; '.join(report['energy']['run']['assumes'])}."
    )
