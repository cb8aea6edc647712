"""The report of a run: measurements, written as JSON, Markdown and a self-contained HTML page."""
