"""Pages of the site that are made when it is built: the command line, and the lab's measured tables and plots."""

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click
from typer.core import TyperGroup
from typer.main import get_command

from experiments.cli import app

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "experiments/lab/results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the command line's page, from the commands themselves, and the files of the lab's results."""
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    for path in sorted((ROOT / RESULTS).iterdir()):
        files.append(File.generated(config, f"lab/results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lab notes link to results where the repository has them; the site has a copy beside the notes."""
    return markdown.replace(f"(../../{RESULTS}/", "(results/") if page.file.src_uri.startswith("lab/") else markdown


def commands() -> str:
    """The help of every command, as Markdown."""
    command = get_command(app)
    with command.make_context("antgmm", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="antgmm", title="Command line")
    text = re.sub(r"^Example: (.*)$", r"Example: `\1`", text, flags=re.MULTILINE)
    for name, about in summaries(command):
        text = re.sub(rf"^\* `{name}`: .*\.\.\.$", f"* `{name}`: {about}", text, flags=re.MULTILINE)
    return text


def summaries(group: TyperGroup) -> Iterator[tuple[str, str]]:
    """Name and one line of every command, which Typer's lists cut to 45 characters."""
    for name, command in group.commands.items():
        yield name, command.get_short_help_str(limit=200)
        if isinstance(command, TyperGroup):
            yield from summaries(command)
