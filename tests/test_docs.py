"""The code in README, guides and concepts runs.

A page's blocks run in order, in one folder and one Python namespace: `python` in this process, `bash` in a shell. A
`toml` block whose title is a file name is written to that file. A block with a title `title="needs ..."` needs
something that tests lack (a network, a GPU): it is not run, and its commands are only parsed.
"""

import os
import re
import shlex
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from typer.testing import CliRunner

import antgmm_jax
from experiments.cli import app
from experiments.run.schema.recipe import load_recipe, load_training

ROOT = Path(__file__).resolve().parents[1]
GUIDES = [page for part in ("guides", "concepts") for page in sorted((ROOT / "docs" / part).iterdir())]
PAGES = ["README.md", "docs/index.md", *(str(page.relative_to(ROOT)) for page in GUIDES)]
_FENCE = RawFencedCodeBlockLexer(re.compile(r'(?P<language>\w*)(?: title="(?P<title>[^"\n]+)")?[^\n]*\n'))
_run_python = PythonEvaluator()


def _blocks(document: Document) -> Iterator[Region]:
    """Every fenced block of a page with the function that checks it."""
    for region in _FENCE(document):
        language, title = region.lexemes["language"], region.lexemes["title"] or ""
        if title.startswith("needs "):
            run = _compile if language == "python" else _show
        else:
            run = {"python": _run_python, "bash": _run_shell, "toml": _keep_toml}.get(language, _show)
        yield Region(region.start, region.end, region.lexemes["source"], run, lexemes=region.lexemes)


def _run_shell(example: Example) -> None:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", example.parsed],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{example.path}:{example.line}\n{example.parsed}\n{done.stdout[-4000:]}"


def _keep_toml(example: Example) -> None:
    """Parses a fragment; a block with a title is also written to a file and must be a valid recipe."""
    keys = tomllib.loads(example.parsed)
    if title := example.region.lexemes["title"]:
        Path(title).write_text(example.parsed)
        (load_training if "phase" in keys else load_recipe)(title)


def _compile(example: Example) -> None:
    compile(example.parsed, example.path, "exec")


def _show(example: Example) -> None:
    """Nothing runs; `test_every_command_shown_exists` reads the commands."""


def _page(page: str) -> list[Example]:
    return list(Sybil([_blocks]).parse(ROOT / page))


@pytest.mark.long  # they train
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    for example in _page(page):
        example.evaluate()


def _commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `antgmm` command in a shell script or session."""
    for line in text.replace("\\\n", " ").splitlines():
        if re.search(r"(^|\s)antgmm ", line):
            words = shlex.split(line, comments=True)
            if "antgmm" in words:
                words = words[words.index("antgmm") + 1 :]
                yield words[: next((i for i, word in enumerate(words) if word in {"|", ">", "&&", ";"}), None)]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_shown_exists(page):
    """`--help` at the end makes the command line check commands and options without running them."""
    for example in _page(page):
        for arguments in _commands(example.parsed):
            result = CliRunner().invoke(app, [*arguments, "--help"])
            assert result.exit_code == 0, f"{page}:{example.line}: antgmm {shlex.join(arguments)}\n{result.output}"


def test_every_make_target_shown_exists():
    pages = "\n".join((ROOT / name).read_text() for name in (*PAGES, "CONTRIBUTING.md"))
    shown = set(re.findall(r"(?:^|`)make ([a-z-]+)", pages, flags=re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert shown and phony
    assert shown <= set(phony[1].split())


def test_the_api_page_lists_every_public_name():
    page = (ROOT / "docs" / "reference" / "antgmm_jax.md").read_text()
    listed = re.findall(r"^::: antgmm_jax\.(?:[\w.]+\.)?(\w+)$", page, flags=re.MULTILINE)
    assert sorted(listed) == antgmm_jax.__all__


def test_the_readme_is_short_and_its_links_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 100
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
