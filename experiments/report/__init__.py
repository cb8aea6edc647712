"""The report of a run: figures are measured once, then told as JSON, as Markdown and as one self-contained page."""

from experiments.report.figures import machine
from experiments.report.write import FORMAT, render, write_report

__all__ = ["FORMAT", "machine", "render", "write_report"]
