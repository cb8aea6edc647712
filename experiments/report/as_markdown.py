"""The report as Markdown."""

import re

from experiments.report.sentences import Report, export_gate, headline
from experiments.report.tables import Table, answers, provenance, sections


def markdown(report: Report) -> str:
    """Renders the report as Markdown.

    Args:
        report: contents of `report.json`.

    Returns:
        Markdown.
    """
    parts = ["# Compression report", f"**{headline(report)}**"]
    parts.append("\n".join(f"* {name}: {cell(value)}" for name, value in provenance(report)))
    for section in sections(report):
        parts += [f"## {section.title}", section.text, table(section.table)]
    parts += ["## Export gate", export_gate(report), "## Answers", table(answers(report))]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(content: Table) -> str:
    """Renders a table as Markdown, with numbers aligned to the right."""
    lines = [
        "| " + " | ".join(content.head) + " |",
        "| --- |" + (" --- |" if content.prose else " ---: |") * (len(content.head) - 1),
    ]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in content.rows])


def cell(text: str) -> str:
    """Escapes text for a cell of a Markdown table, on one line: answers may contain anything."""
    return re.sub(r"([\\`*_\[\]<>|&~])", r"\\\1", " ".join(text.split()))
