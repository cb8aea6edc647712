"""The report of a run: figures are measured once, then told as JSON, as Markdown and as one self-contained page."""
