"""The command line: every command is listed, has an example, starts at once and names a missing extra."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from jaxlib.xla_client import generate_pjrt_gpu_plugin_options
from typer.main import get_command

from experiments import cli
from experiments.commands.runs import TEACHER

ROOT = Path(__file__).resolve().parents[3]

COMMANDS = [
    *(
        ["demo"],
        ["compress"],
        ["train"],
        ["import"],
        ["eval"],
        ["export"],
        ["package"],
        ["serve"],
        ["search"],
        ["plan"],
        ["shrink"],
        ["vocabulary"],
    ),
    *(["cost"], ["recombine"], ["report"], ["data"], ["data", "maad"], ["data", "prepare"], ["lab"]),
    ["data", "lmms-eval"],
    *(
        ["lab", name]
        for name in ("bench", "stalls", "stream", "memory", "accelerator", "study", "tasks", "peers", "energy")
    ),
    *(["lab", name] for name in ("servers", "serving", "plans", "smollm2", "delta", "cuts")),
]
# Commands may cause warnings of PyTorch and transformers.
pytestmark = pytest.mark.filterwarnings("default")


def test_commands_are_listed_in_the_documented_order():
    command: Any = get_command(cli.app)
    groups = {(): command, **{(name,): command.commands[name] for name in ("data", "lab")}}
    listed = [[*path, name] for path, group in groups.items() for name in group.commands]
    assert sorted(listed) == sorted(COMMANDS)
    # In the documented order: from the first commands that a user needs to the benchmarks.
    assert list(command.commands) == [words[0] for words in COMMANDS if len(words) == 1]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_has_an_example(antgmm, words):
    shown = antgmm(*words, "--help")
    assert shown.exit_code == 0
    assert f"Example: antgmm {' '.join(words)}" in shown.stdout
    command: Any = get_command(cli.app)
    for word in words:
        command = command.commands[word]
    # Verbatim: Rich would replace names of emoji such as ":m:".
    assert command.epilog in " ".join(shown.stdout.split())


HEAVY = (
    *("jax", "flax", "optax", "orbax", "grain", "transformers", "torch", "numpy", "scipy", "safetensors"),
    *("matplotlib", "jinja2", "pyarrow", "codecarbon", "tensorflow_datasets", "rouge_score", "PIL"),
)


def in_a_fresh_process(code, *arguments, cwd=None):
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    where = {"cwd": cwd, "env": {**os.environ, "PYTHONPATH": f"{ROOT}"}}
    return json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True, **where).stdout.splitlines()[-1]
    )


def test_help_loads_no_heavy_library():
    code = """
        import contextlib, json, sys
        from experiments.cli import main
        with contextlib.suppress(SystemExit):
            main(["--help"])
        print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
    """
    assert not set(HEAVY) & set(in_a_fresh_process(code))


BEGUN = {
    "demo": "compressing by",
    "compress r.toml --run r": "compressing by r.toml in r",
    "train r.toml --run r": "training by r.toml in r",
    "import m": "import: checking every tensor of m",
    "eval m --data jsonl:d": "eval: scoring answers of m to jsonl:d",
    "export s --like m --out o": "export: writing s to o",
    "package m --out o.pt2": "package: compiling m into o.pt2",
    "serve m": "serve: m at http://127.0.0.1:8000/v1",
    "search m --params 9": "search: sizes of m within 9 parameters",
    "plan m": "plan: compiling a training step of m for fsdp=8",
    "shrink m --out o --like p --data jsonl:d": "shrink: pruning m to p, into o",
    "vocabulary m --data jsonl:d --out o": "vocabulary: removing from m the tokens that jsonl:d does not use, into o",
    "cost --preset p": "cost: computing the cost of a request to p",
    "recombine r.toml --run r --steps 9 --from s": "recombining s by r.toml in r",
    "report r": "report: r",
    "data maad --out o": "data: generating MAAD-synth, tier s, in o",
    "data lmms-eval m --data jsonl:d --out o": "data: writing jsonl:d as a task for lmms-eval in o",
    "data prepare r.toml --out o": "data: preparing the rows of r.toml in o",
    "lab bench": "bench:",
    "lab stalls": "stalls:",
    "lab stream": "stream:",
    "lab accelerator": "accelerator:",
    "lab study s.toml --run r --out o": "study: running the arms of s.toml in r",
    "lab tasks --run r --out o": "tasks:",
    "lab peers --out o": "peers:",
    "lab servers --out o": "servers:",
    "lab serving t s --data jsonl:d --out o": "serving: loading servers of t and s",
    "lab plans --out o": "plans:",
    "lab smollm2 --out o": "smollm2: writing the model in o",
    "lab delta m --out o": "delta: comparing m with",
    "lab cuts m --out o": "cuts: measuring perplexity after cuts of m",
    "lab memory m": "memory:",
    "lab energy --watts 1 --teacher-ms 1 --student-ms 1 --rate 1": "energy:",
}


def test_every_command_prints_its_first_line_before_loading_heavy_libraries(tmp_path):
    """Heavy libraries can be located but not loaded, so a command stops after its first line."""
    code = """
        import json, os, sys
        from importlib.abc import Loader, MetaPathFinder
        from importlib.machinery import ModuleSpec
        from typer.testing import CliRunner
        from experiments import cli

        class Refusing(MetaPathFinder, Loader):
            def find_spec(self, name, path=None, target=None):
                return ModuleSpec(name, self) if name in heavy else None

            def exec_module(self, module):
                raise ImportError(module.__name__)

        heavy = sys.argv[1].split(",")
        sys.meta_path.insert(0, Refusing())
        results = {words: CliRunner().invoke(cli.app, words.split()) for words in sys.argv[2:]}
        print(json.dumps({words: [one.stderr, repr(one.exception)] for words, one in results.items()}))
    """
    results = in_a_fresh_process(code, ",".join(HEAVY), *BEGUN, cwd=tmp_path)  # one that goes on writes files
    for words, (shown, exception) in results.items():
        assert shown.startswith(BEGUN[words]), (words, shown, exception)
        # Every command then loads such a library, except the report of a missing run and the energy formula.
        assert exception.startswith("ImportError") or words.startswith(("report", "lab energy")), (words, exception)
    named = {" ".join(words) for words in COMMANDS} - {"data", "lab"}
    assert {name for name in named if any(f"{words} ".startswith(f"{name} ") for words in BEGUN)} == named


MISSING = [
    ("eval m --data jsonl:d", "rouge_score", "scores of answers need rouge_score", "eval"),
    ("export s --like m --out o", "torch", "PyTorch checks need torch", "torch"),
    ("report r", "matplotlib", "reports need matplotlib", "report"),
    ("data maad --out o", "pyarrow", "Parquet files need pyarrow", "parquet"),
    ("eval m --data parquet:x.parquet", "pyarrow", "Parquet files need pyarrow", "parquet"),
    ("eval m --data tfds:.:test", "tensorflow_datasets", "TFDS folders need tensorflow_datasets", "tfds"),
    ("train r.toml --run r", "codecarbon", "energy figures need codecarbon", "energy"),
    (
        "demo --run r",
        "codecarbon rouge_score matplotlib torch",
        "energy figures, scores of answers, reports and PyTorch checks need codecarbon, rouge_score, matplotlib and"
        " torch",
        "energy,eval,report,torch",
    ),
]


@pytest.mark.parametrize(("words", "absent", "complaint", "extras"), MISSING)
def test_a_missing_extra_is_named_with_its_install_command(
    refused, monkeypatch, tmp_path, words, absent, complaint, extras
):
    for name in absent.split():
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "x.parquet").touch()
    (tmp_path / "m").symlink_to(TEACHER)
    command = f".venv/bin/pip install -e '.[{extras}]' -c constraints.txt"
    assert refused(*words.split()) == f"{complaint}: {command}"
    assert not [name for name in ("o", "r") if (tmp_path / name).exists()]


def test_environment_keeps_the_users_settings(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    cli.environment()
    assert (os.environ["JAX_COMPILATION_CACHE_DIR"], os.environ["HF_HUB_OFFLINE"]) == ("elsewhere", "1")


FRACTION, OLD_FRACTION = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.mark.parametrize(
    ("given", "expected"), [({}, 0.92), ({FRACTION: "0.5"}, 0.5), ({OLD_FRACTION: "0.5"}, 0.5)], ids=str
)
def test_jax_gets_one_fraction_of_the_memory_under_one_of_its_names(monkeypatch, given, expected):
    others = {name: value for name, value in os.environ.items() if name not in (FRACTION, OLD_FRACTION)}
    monkeypatch.setattr(os, "environ", {**others, **given})
    cli.environment()
    # It raises an error if both are set, and JAX then has no GPU.
    assert generate_pjrt_gpu_plugin_options()["memory_fraction"] == expected
