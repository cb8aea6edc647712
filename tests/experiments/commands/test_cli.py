"""The command line: help with examples, figures as JSON, errors in one line with exit code 2."""

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from typer.main import get_command

import pruning
from antgmm_jax.axes import sizes, to_dict
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import FAMILIES
from antgmm_jax.io import checkpoint, convert, tensors
from antgmm_jax.io.convert import load_hf, save_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.presets import PRESETS, preset
from antgmm_jax.pure import abstract, functional
from data.readers import read_records
from data.record import PROMPT
from experiments import cli
from experiments.commands.models import _runs
from experiments.commands.runs import TEACHER
from experiments.commands.sources import check_prompts
from experiments.run.rows.datasets import encoded, load_records
from experiments.run.schema.recipe import load_recipe
from experiments.run.student import teacher_key
from tests import reference
from tests.experiments.tiny import save_teacher, write_recipe

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
SHRINK = ("shrink", "nowhere", "--out", "o", "--importance", "magnitude")
SERVICE = ("lab", "energy", "--watts", "400", "--teacher-ms", "700", "--student-ms", "90")
# Commands may cause warnings of PyTorch and transformers.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def teacher(tmp_path):
    return reference.saved(reference.blip2(), tmp_path / "teacher")


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


def in_a_fresh_process(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


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
    results = in_a_fresh_process(code, ",".join(HEAVY), *BEGUN)
    for words, (shown, exception) in results.items():
        assert shown.startswith(BEGUN[words]), (words, shown, exception)
        # Every command then loads such a library, except the report of a missing run and the energy formula.
        assert exception.startswith("ImportError") or words.startswith(("report", "lab energy")), (words, exception)
    named = {" ".join(words) for words in COMMANDS} - {"data", "lab"}
    assert {name for name in named if any(f"{words} ".startswith(f"{name} ") for words in BEGUN)} == named


MISSING = [
    ("eval m --data jsonl:d", "rouge_score", "scores of answers need rouge_score: pip install 'antgmm-jax[eval]'"),
    ("export s --like m --out o", "torch", "PyTorch checks need torch: pip install 'antgmm-jax[torch]'"),
    ("report r", "matplotlib", "reports need matplotlib: pip install 'antgmm-jax[report]'"),
    ("data maad --out o", "pyarrow", "Parquet files need pyarrow: pip install 'antgmm-jax[parquet]'"),
    (
        "eval m --data parquet:x.parquet",
        "pyarrow",
        "Parquet files need pyarrow: pip install 'antgmm-jax[parquet]'",
    ),
    (
        "eval m --data tfds:.:test",
        "tensorflow_datasets",
        "TFDS folders need tensorflow_datasets: pip install 'antgmm-jax[tfds]'",
    ),
    ("train r.toml --run r", "codecarbon", "energy figures need codecarbon: pip install 'antgmm-jax[energy]'"),
    (
        "demo --run r",
        "codecarbon rouge_score matplotlib torch",
        "energy figures, scores of answers, reports and PyTorch checks need codecarbon, rouge_score, matplotlib and"
        " torch: pip install 'antgmm-jax[energy,eval,report,torch]'",
    ),
]


@pytest.mark.parametrize(("words", "absent", "complaint"), MISSING)
def test_a_missing_extra_is_named_with_its_install_command(refused, monkeypatch, tmp_path, words, absent, complaint):
    for name in absent.split():
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "x.parquet").touch()
    (tmp_path / "m").symlink_to(TEACHER)
    assert refused(*words.split()) == complaint
    assert not [name for name in ("o", "r") if (tmp_path / name).exists()]


def test_environment_keeps_the_users_settings(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    cli.environment()
    assert (os.environ["JAX_COMPILATION_CACHE_DIR"], os.environ["HF_HUB_OFFLINE"]) == ("elsewhere", "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loss.hrad=1.0", "unknown key loss.hrad, did you mean 'hard'?"),
        ('stage.0.sizes={"vision/embed"=20}', "nearest legal sizes: vision/embed 16 or 24"),
        ('stage.0.sizes={"vision/layers"=9}', "vision/layers = 9 would enlarge the axis: it has 2 units"),
        ('stage.0.sizes={"vision/leyers"=1}', "unknown axis 'vision/leyers': did you mean 'vision/layers'?"),
        ('parent="nowhere"', "nowhere"),
    ],
)
def test_a_bad_recipe_is_refused_and_leaves_nothing(refused, teacher, tmp_path, change, message):
    recipe = write_recipe(tmp_path / "r.toml", teacher, sizes='"vision/layers" = 1')
    assert message in refused("compress", recipe, "--run", "run", "--set", change)
    assert not (tmp_path / "run").exists()


def test_a_bad_checkpoint_is_refused(refused, teacher, tmp_path):
    weights = teacher / "model.safetensors"
    recipe, whole = write_recipe(tmp_path / "r.toml", teacher), weights.read_bytes()
    commands = (["compress", recipe, "--run", "run"], ["import", teacher], ["cost", teacher])
    weights.write_bytes(whole[: len(whole) // 2])
    for words in commands:
        assert f"{weights} cannot be read" in refused(*words)
    weights.write_bytes(whole)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_vl"}))
    for words in commands:
        assert "model_type 'qwen2_vl' is not supported: use one of blip-2, llava" in refused(*words)
    (teacher / "config.json").unlink()
    assert "config.json is missing" in refused("import", teacher)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.toml", "teacher"]


def test_a_folder_of_another_run_is_refused_and_unchanged(refused, teacher, tmp_path):
    recipe, run = write_recipe(tmp_path / "r.toml", teacher), tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert "is not empty and not a run" in refused("compress", recipe, "--run", run)
    (run / "notes.txt").unlink()
    dumped = tmp_path / "dumped.toml"
    from experiments.run.schema.recipe import dump_recipe, load_recipe

    dumped.write_text(dump_recipe(load_recipe(recipe)))
    (run / "recipe.toml").write_text(dumped.read_text())
    complaint = refused("compress", recipe, "--run", run, "--set", "seed=7")
    assert "is a run of another recipe (seed: 0 / 7)" in complaint
    assert (run / "recipe.toml").read_text() == dumped.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cost"], "--preset"),
        (["cost", "--preset", "antgmm-huge"], "unknown preset 'antgmm-huge'"),
        (["report", "nowhere"], "nowhere has no report"),
        (["compress", "none.toml", "--run", "run"], "cannot read the recipe none.toml"),
        (
            ["data", "maad", "--split", "tset", "--out", "d"],
            "no split 'tset': choose one of train, val, test, test_hard",
        ),
        (["recombine", "none.toml", "--run", "run", "--from", "a", "--steps", "1"], "cannot read the recipe none.toml"),
        (["export", "nowhere", "--like", "t", "--out", "o"], "nowhere"),
        (["shrink", "nowhere", "--out", "o"], "--size or --like"),
        (["shrink", "nowhere", "--out", "o", "--size", "vision/mlp=1", "--like", "antgmm-300m"], "--size or --like"),
        ([*SHRINK, "--size", "vision/mlp=no"], "write it as vision/layers=12"),
        ([*SHRINK, "--size", "vision/mlp=1.5"], "write it as vision/layers=12"),
        ([*SHRINK, "--like", "antgmm-300m"], "nowhere/config.json is missing"),
        (["shrink", "nowhere", "--out", "o", "--like", "antgmm-300m"], "add --data jsonl:PATH"),
        ([*SHRINK, "--like", "antgmm-300m", "--data", "jsonl:d"], "add --data jsonl:PATH"),
        ([*SERVICE], "specify either --kwh-a-year"),
        ([*SERVICE, "--rate", "1", "--kwh-a-year", "1"], "specify either --kwh-a-year"),
        ([*SERVICE[:-1], "800", "--kwh-a-year", "1"], "saves nothing at this power and these latencies"),
    ],
)
def test_errors_are_one_line(refused, tmp_path, words, message):
    assert message in refused(*words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("maad:s", "write it as maad:TIER:SPLIT"),
        ("csv:a.csv", "write it as maad:TIER:SPLIT"),
        ("maad:xl:test", "tier = 'xl': Input should be 's', 'm' or 'full'"),
        ("jsonl:a.jsonl", "a.jsonl does not exist"),
    ],
)
def test_unknown_forms_of_data_are_refused(data, message):
    from antgmm_jax.errors import AntgmmError
    from experiments.commands.sources import records

    with pytest.raises(AntgmmError, match=message):
        records(data, 0)


def test_a_wrong_option_is_a_usage_error(antgmm):
    assert antgmm("cost", "--batch", "0").exit_code == 2
    assert antgmm("dmeo").exit_code == 2


def test_a_stopped_run_says_how_to_resume(antgmm, monkeypatch, teacher, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.run.pipeline.Run.exported", stop)
    result = antgmm("compress", write_recipe(tmp_path / "r.toml", teacher), "--run", "run")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[1:] == ["stopped; run the same command to resume"]


@pytest.mark.parametrize(
    ("command", "goes_on"), [("experiments.lab.study.run.run_study", True), ("experiments.lab.bench.ratios.run", False)]
)
def test_a_stopped_measurement_says_whether_it_can_resume(antgmm, monkeypatch, tmp_path, command, goes_on):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, stop)
    monkeypatch.setattr("experiments.lab.study.arms.load_study", lambda path: None)
    words = ("study", "s.toml", "--run", "run", "--out", "o.json") if goes_on else ("bench",)
    result = antgmm("lab", *words)
    assert result.exit_code == 130
    _, last = result.stderr.splitlines()
    assert last == ("stopped; run the same command to resume" if goes_on else "stopped")


def test_a_failed_run_keeps_its_stages_and_says_how_to_resume(antgmm, monkeypatch, teacher, tmp_path):
    from antgmm_jax.errors import AntgmmError

    def fail(run):
        with run.folder.opened(run.recipe):
            (run.folder.path / "stages").mkdir()
            raise AntgmmError("the loss is not finite")

    monkeypatch.setattr("experiments.run.pipeline.Run.exported", fail)
    result = antgmm("compress", write_recipe(tmp_path / "r.toml", teacher), "--run", "run")
    assert result.exit_code == 2
    assert "run the same command to resume" in result.stderr
    assert "error: the loss is not finite" in result.stderr
    assert (tmp_path / "run" / "stages").exists()
    assert "it is failed: the loss is not finite" in antgmm("report", "run").stderr


def test_a_full_disk_is_refused_in_one_line(refused, monkeypatch, teacher, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device", "run/x")

    monkeypatch.setattr("experiments.run.pipeline.Run.exported", full)
    complaint = refused("compress", write_recipe(tmp_path / "r.toml", teacher), "--run", "run")
    assert complaint == "run/x: No space left on device; fix this and start again"


def test_cost_of_a_preset_equals_pruning_cost(antgmm):
    figures = json.loads(antgmm("cost", "--preset", "antgmm-5b", "--length", "100", "--answer", "9", "--json").stdout)
    expected = pruning.cost(PRESETS["antgmm-5b"], 1, 100, 9)
    assert figures["parameters"] == expected.parameters
    assert figures["params"] == sum(expected.parameters.values())
    assert figures["flops"] == expected.flops
    assert "encoder" in antgmm("cost", "--preset", "antgmm-tiny").stdout


def test_cost_of_a_checkpoint_reads_headers_only(antgmm, monkeypatch, tmp_path):
    """The values of the 11 GB file are a hole, and no tensor may be read."""
    config, model = PRESETS["antgmm-5b"], tmp_path / "large"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(FAMILIES[config.family].to_hf(config)))
    tensors.write(convert._specs(config, abstract(config, jnp.bfloat16), None), (), model, "20GB")
    weights = model / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size + 2 * sum(p.size for p in _leaves(config)))

    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("antgmm_jax.io.tensors.Tensors._rows", read)
    figures = json.loads(antgmm("cost", model, "--json").stdout)
    assert figures == json.loads(antgmm("cost", "--preset", "antgmm-5b", "--json").stdout)
    assert weights.stat().st_size > 10e9 > 1e6 > 512 * weights.stat().st_blocks


@pytest.mark.parametrize("model", [reference.blip2, reference.llava])
def test_shrink_writes_the_files_of_a_cut_in_memory(antgmm, tmp_path, model):
    teacher = reference.saved(model(), tmp_path / "teacher")
    words = ["shrink", teacher, "--size", "vision/layers=1", "--size", "vision/mlp=0.5", "--disk"]
    words += ["--importance", "magnitude", "--out", "out"]
    figures = json.loads(antgmm(*words, "--json").stdout)
    config, params = load_hf(teacher)
    keep = pruning.plan(pruning.magnitude(params, config), config, {"vision/layers": 1, "vision/mlp": 0.5})
    smaller, cut = pruning.shrink(config, params, keep)
    save_hf(smaller, cut, tmp_path / "expected", like=teacher)
    for path in (tmp_path / "expected").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert figures["params"]["out"] == sum(leaf.size for leaf in _arrays(cut))
    assert figures["score"]["read"] == sum(leaf.nbytes for leaf in _arrays(params))
    assert figures["cut"]["written"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert figures["cut"]["read"] < figures["score"]["read"]
    assert set(figures["disk"]["ratio"]) == {"score", "cut", "both"}
    assert "out exists" in antgmm(*words).stderr
    words[-1] = "other"
    assert "/ disk alone" in antgmm(*words).stdout


def test_shrink_like_a_preset_needs_heads_of_its_width(refused, teacher, tmp_path):
    llava = reference.saved(reference.llava(), tmp_path / "llava")
    words = ("--out", "out", "--importance", "magnitude")
    complaint = refused("shrink", teacher, *words, "--like", "antgmm-300m")
    assert "heads of vision have width 8, in antgmm-300m 88" in complaint
    assert "antgmm-300m has family" in refused("shrink", llava, *words, "--like", "antgmm-300m")
    assert "would enlarge the axis" in refused("shrink", teacher, *words, "--size", "vision/layers=9")
    assert not (tmp_path / "out").exists()


def test_energy_of_a_claim_and_of_its_request_rate_agree(antgmm):
    claim = json.loads(antgmm(*SERVICE, "--kwh-a-year", "75e6", "--json").stdout)
    rate = str(claim["requests_a_second"])
    figures = json.loads(antgmm(*SERVICE, "--rate", rate, "--json").stdout)
    assert figures["saved"]["kwh_a_year"] == pytest.approx(75e6)
    assert "3.03 G per day" in antgmm(*SERVICE, "--rate", rate).stdout


@pytest.mark.parametrize("model", [reference.blip2, reference.llava])
def test_import_prints_what_can_be_cut(antgmm, tmp_path, model):
    directory = reference.saved(model(), tmp_path / "model")
    figures = json.loads(antgmm("import", directory, "--json").stdout)
    config, _ = load_hf(directory)
    assert {axis: described["size"] for axis, described in figures["axes"].items()} == sizes(config)
    assert figures["params"] == sum(p.size for p in _leaves(config))
    # The width shrinks in steps of one head of 8 channels.
    assert figures["axes"]["vision/embed"]["legal"] == [8, 16, 24, 32]
    assert figures["axes"]["vision/embed"]["tied"] == ["vision/heads"]
    assert "8, 16 ... 32" in antgmm("import", directory).stdout


def _leaves(config):
    import jax

    return jax.tree.leaves(jax.eval_shape(functional(config).init, jax.random.key(0)))


def test_sizes_are_printed_as_ranges():
    assert _runs([1, 2, 3, 4, 5]) == "1 to 5"
    assert _runs([32, 64, 96, 128]) == "32, 64 ... 128"
    assert _runs([1, 2, 4, 8]) == "1, 2, 4, 8"
    assert _runs([]) == "none"


@pytest.mark.parametrize(("form", "kind"), [("parquet", "parquet"), ("jsonl", "jsonl"), ("chat", "jsonl")])
def test_maad_is_written_and_read_back(antgmm, tmp_path, form, kind):
    words = ["data", "maad", "--tier", "s", "--split", "test", "--samples", "5", "--out", "maad", "--json"]
    info = json.loads(antgmm(*words, "--format", form).stdout)
    assert info["sizes"] == {"test": 5}
    assert len(read_records(kind, tmp_path / "maad" / f"test.{kind}")) == 5


def test_a_recipe_trains_on_its_prepared_rows(antgmm, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.toml", save_teacher(tmp_path / "teacher"))
    info = json.loads(antgmm("data", "prepare", recipe, "--out", "rows", "--json").stdout)
    changed = [
        f"data={{kind = 'prepared', path = 'rows', samples = {info['records']}}}",
        "evaluate.data={kind = 'maad', tier = 's', split = 'val', samples = 8}",
    ]
    rows = load_recipe(recipe, changed)
    processor, config = load_processor(tmp_path / "teacher"), load_hf(tmp_path / "teacher")[0]
    prepared, drawn = (
        encoded(each, load_records(each.data), processor, config, trained=True) for each in (rows, load_recipe(recipe))
    )
    assert prepared.fingerprint == drawn.fingerprint == info["fingerprint"]
    with pytest.raises(AntgmmError, match=r"evaluate\.data.*'prepared'"):
        load_recipe(recipe, ["evaluate.data={kind = 'prepared', path = 'rows', samples = 5}"])
    other = antgmm("data", "prepare", recipe, "--out", "rows", "--set", "max_answer=9")
    assert (other.exit_code, other.stderr.count("\n")) == (2, 2)
    assert "rows holds other rows or was made with other settings" in other.stderr


@pytest.mark.parametrize("model", [reference.blip2, reference.llava])
def test_export_writes_a_stage_that_transformers_reads(antgmm, monkeypatch, tmp_path, model):
    teacher = reference.saved(model(), tmp_path / "teacher")
    config, params = load_hf(teacher)
    keep = {"vision/mlp": np.tile(np.arange(24, dtype=np.int32), (sizes(config)["vision/layers"], 1))}
    smaller, cut = pruning.shrink(config, params, keep)
    record = {
        "config": to_dict(smaller),
        "keep": pruning.compose(pruning.identity(config), keep),
        "teacher": teacher_key(params),
    }
    checkpoint.save_stage(tmp_path / "stage", {"params": cut}, record)
    words = ["export", "stage", "--like", teacher, "--out", "out", "--samples", "3", "--max-new-tokens", "4", "--json"]
    figures = json.loads(antgmm(*words).stdout)
    assert figures["passed"] and figures["prompts"] == 3
    assert sizes(load_hf(tmp_path / "out")[0])["vision/mlp"] == 24
    assert {str(p.dtype) for p in _arrays(load_hf(tmp_path / "out")[1])} == {"bfloat16"}
    assert json.loads((tmp_path / "out" / "antgmm.json").read_text()) == {"prompt": PROMPT}
    assert "out exists" in antgmm(*words).stderr
    words[5] = "prompted"
    assert "--prompt is the template for the records of --data" in antgmm(*words, "--prompt", "{question}").stderr

    for bound in ("TOLERANCE", "ROUNDING"):
        monkeypatch.setattr(f"experiments.run.export.export_gate.{bound}", 0.0)
    words[5] = "again"
    result = antgmm(*words)
    assert result.exit_code == 2
    assert "error: again was not written: the export gate failed: logits of sample" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stage", "teacher"]


def test_the_check_draws_the_requested_number_of_random_prompts():
    batches, conversations = check_prompts(preset("antgmm-tiny"), None, "", 40, "")
    assert conversations == []
    assert [len(batch["input_ids"]) for batch in batches] == [32, 8]
    assert np.concatenate([batch["index"] for batch in batches]).tolist() == list(range(40))


def _arrays(params):
    import jax

    return jax.tree.leaves(params)


def test_eval_scores_by_type(antgmm, tmp_path):
    model = save_teacher(tmp_path / "model")
    words = ["eval", model, "--data", "maad:s:test", "--samples", "12", "--max-new-tokens", "2"]
    figures = json.loads(antgmm(*words, "--json").stdout)
    assert figures["count"] == 12
    assert len(figures["by_type"]) == 12
    assert set(figures["token_loss_by_type"]) == set(figures["by_type"])
    shown = antgmm(*words).stdout
    assert "verdict" in shown and f"{figures['token_loss']:.4f}" in shown
    # --prompt replaces the template: it must contain all text of the records.
    left_out = antgmm(*words, "--prompt", "Question: {question} Answer:")
    assert left_out.exit_code == 2 and "does not contain the text of rows" in left_out.stderr
    assert "--prompt '{answer}' contains {answer}" in antgmm(*words, "--prompt", "{answer}").stderr
