"""Commands on models and rows: their figures and files equal those of the functions behind them."""

import json
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import FAMILIES
from antgmm_jax.io import convert, tensors
from antgmm_jax.io.convert import load_hf, save_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.presets import PRESETS, preset
from antgmm_jax.pure import abstract, functional
from data.readers import read_records
from experiments.commands.models import _runs
from experiments.commands.scores import _shown
from experiments.commands.sources import answer_length, check_prompts, records
from experiments.run.disk_cut import targets_of
from experiments.run.export.export_gate import GateResult
from experiments.run.rows.datasets import encoded, load_records
from experiments.run.rows.samples import Samples
from experiments.run.schema.recipe import load_recipe
from tests import reference
from tests.experiments.tiny import save_llava, save_stage, save_teacher, write_recipe
from tests.marks import long

QUESTION = "[{text} ]{question}"
SERVICE = ("lab", "energy", "--watts", "400", "--teacher-ms", "700", "--student-ms", "90")
# Commands may cause warnings of PyTorch and transformers.
pytestmark = pytest.mark.filterwarnings("default")


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


@pytest.mark.parametrize("model", [long(reference.blip2), reference.llava])
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


@pytest.mark.parametrize(("name", "other"), [("blip2-opt-tiny", "antgmm-tiny"), ("antgmm-tiny", "blip2-opt-tiny")])
def test_sizes_of_a_preset_with_another_language_model_are_refused_in_one_line(name, other):
    config = preset(name)
    assert config.family == preset(other).family
    with pytest.raises(AntgmmError, match=f"^{other} and the checkpoint have other towers .*: specify sizes instead$"):
        targets_of(config, other)


def test_sizes_of_a_preset_with_other_query_heads_are_refused_in_one_line():
    message = "a key-value head of text has 4 query heads, in qwen3-vl-2b 2: they are pruned together; specify sizes"
    with pytest.raises(AntgmmError, match=message):
        targets_of(preset("qwen3-vl-4b"), "qwen3-vl-2b")


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


def test_a_task_of_invalid_rows_lists_all_of_them_and_writes_nothing(antgmm, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    rows = [{"image": image, "question": "q", "answer": "a"} for image in ([], "none.png", [], "text.png")]
    rows.append({"image": [], "question": "no answer"})
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    before = sorted(path.name for path in tmp_path.iterdir())
    result = antgmm("data", "lmms-eval", "--data", "jsonl:rows.jsonl", "--out", "task")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "rows.jsonl: 3 of 5 rows are invalid" in result.stderr
    for line in ("line 2: image none.png is missing", "line 4: image text.png cannot", "line 5: has no answer"):
        assert line in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_task_lets_every_right_answer_be_given_if_the_model_is_known(antgmm, tmp_path):
    row = {"image": [], "question": "what price is pictured?", "answer": "the price is 3 " * 20}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    model = save_llava(tmp_path / "model")
    longest = len(load_processor(model).tokenizer(row["answer"]).input_ids)

    def limit(name, *words):
        result = antgmm("data", "lmms-eval", *words, "--data", "jsonl:rows.jsonl", "--out", name, "--json")
        figures, task = json.loads(result.stdout), (tmp_path / name / f"{name}.yaml").read_text()
        assert f"\n  max_new_tokens: {figures['max_new_tokens']}\n" in task
        return figures[
            "max_new_tokens"
        ], "note: answers are cut after 32 tokens: give --max-new-tokens" in result.stderr

    tokens, noted = limit("known", model)
    assert tokens > 32 and longest <= tokens <= longest + 2 and not noted
    assert limit("unknown") == (32, True)
    assert limit("given", model, "--max-new-tokens", "7") == (7, False)


def test_a_check_takes_all_rows_where_there_are_fewer(tmp_path):
    row = json.dumps({"image": [], "question": "q", "answer": "a"})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 3)
    data = f"jsonl:{tmp_path / 'rows.jsonl'}"
    assert [len(records(data, samples, fewer=True)) for samples in (2, 3, 64)] == [2, 3, 3]
    assert len(records("maad:s:test", 10**6, fewer=True)) == len(records("maad:s:test", 0))
    with pytest.raises(AntgmmError, match="has 3 records, but samples = 64"):
        records(data, 64).check({})


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


@pytest.mark.parametrize("model", [long(reference.blip2), reference.llava])
def test_export_writes_a_stage_that_transformers_reads(antgmm, monkeypatch, tmp_path, model):
    teacher = reference.saved(model(), tmp_path / "teacher")
    config, params = load_hf(teacher)
    keep = {"vision/mlp": np.tile(np.arange(24, dtype=np.int32), (sizes(config)["vision/layers"], 1))}
    stage = tmp_path / "run" / "stages" / "01-cut"
    save_stage(stage, config, params, keep)
    (stage.parents[1] / "recipe.toml").write_text(f"prompt = {json.dumps(QUESTION)}\n")
    words = ["export", stage, "--like", teacher, "--out", "out", "--samples", "3", "--max-new-tokens", "4", "--json"]
    figures = json.loads(antgmm(*words).stdout)
    assert figures["passed"] and figures["prompts"] == 3
    assert sizes(load_hf(tmp_path / "out")[0])["vision/mlp"] == 24
    assert {str(p.dtype) for p in _arrays(load_hf(tmp_path / "out")[1])} == {"bfloat16"}
    assert json.loads((tmp_path / "out" / "antgmm.json").read_text()) == {"prompt": QUESTION}
    assert "out exists" in antgmm(*words).stderr

    for bound in ("TOLERANCE", "ROUNDING"):
        monkeypatch.setattr(f"experiments.run.export.export_gate.{bound}", 0.0)
    words[5] = "again"
    result = antgmm(*words)
    assert result.exit_code == 2
    assert "error: again was not written: the export gate failed: logits of sample" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run", "teacher"]


def test_a_check_and_a_package_let_every_right_answer_be_given(antgmm, monkeypatch, tmp_path):
    """Scores of a quantized copy would count longer ones as wrong, and a package could not give them."""
    model, stage = save_llava(tmp_path / "model"), tmp_path / "stage"
    config, params = load_hf(model)
    save_stage(stage, config, params, {})
    row = {"image": [], "question": "what price is pictured?", "answer": "the price is 3 " * 20}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    source, processor = records("jsonl:rows.jsonl", 0), load_processor(model)
    longest = answer_length(Samples(source, processor, config))
    given = []

    def published(*args, questions, **_):
        given.append(questions.max_new_tokens)
        shutil.copytree(model, args[2])
        return GateResult(0.0, 1.0, 0.0, 1.0, 1, True, "")

    def stopped(tokens):
        given.append(tokens)
        raise AntgmmError("stopped")

    monkeypatch.setattr("experiments.run.export.publishing.publish", published)
    monkeypatch.setattr("experiments.run.export.quantized.publish_quantized", lambda *args: stopped(args[3]))
    monkeypatch.setattr("experiments.package.stablehlo.stablehlo", lambda *args: stopped(args[3].tokens))
    export = ["export", stage, "--like", model, "--quantize", "w8a8"]
    for number, words in enumerate(([], ["--max-new-tokens", "7"])):
        words = [*words, "--data", "jsonl:rows.jsonl"]
        assert antgmm(*export, "--out", f"out{number}", *words).stderr.endswith("error: stopped\n")
        assert antgmm("package", model, "--out", "p.stablehlo", *words).stderr.endswith("error: stopped\n")
    assert longest > 60
    assert given == [longest] * 3 + [7] * 3


def test_an_export_records_the_prompt_that_is_given_else_that_of_its_run_else_the_teachers(
    antgmm, monkeypatch, tmp_path
):
    teacher, recorded = save_llava(tmp_path / "teacher"), []
    stage = tmp_path / "run" / "stages" / "01-cut"
    save_stage(stage, *load_hf(teacher), {})

    def published(*_, prompt, **__):
        recorded.append(prompt)
        raise AntgmmError("stopped")

    monkeypatch.setattr("experiments.run.export.publishing.publish", published)
    words = ["export", stage, "--like", teacher, "--out", "out", "--samples", "1"]
    (teacher / "antgmm.json").write_text('{"prompt": "Q: {question}"}')
    for recipe in ("", "seed = 1\n", f"prompt = {json.dumps(QUESTION)}\n"):
        if recipe:
            (tmp_path / "run" / "recipe.toml").write_text(recipe)
        assert antgmm(*words).stderr.endswith("error: stopped\n")
    assert antgmm(*words, "--prompt", "{question}").stderr.endswith("error: stopped\n")
    assert recorded == ["Q: {question}", "Q: {question}", QUESTION, "{question}"]
    assert not (tmp_path / "out").exists()


def test_the_check_draws_the_requested_number_of_random_prompts():
    batches, conversations, tokens = check_prompts(preset("antgmm-tiny"), None, "", 40, "", 0)
    assert (conversations, tokens) == ([], 32)
    assert [len(batch["input_ids"]) for batch in batches] == [32, 8]
    assert np.concatenate([batch["index"] for batch in batches]).tolist() == list(range(40))


def _arrays(params):
    import jax

    return jax.tree.leaves(params)


def test_token_losses_of_a_table_of_scores_have_their_own_column():
    scores = {"exact_match": 0.5, "final_token": 0.6, "rouge_l": 0.7, "by_type": {"price": 0.5}}
    jax = {**scores, "token_loss": 1.25, "token_loss_by_type": {"price": 1.5}}
    for columns, head in (
        ({"JAX": jax}, ["question type", "exact match", "token loss"]),
        ({"server": scores, "JAX": jax}, ["question type", "server", "JAX", "token loss"]),
    ):
        (shown,) = _shown(columns, {"by_type": scores["by_type"], "count": 4})
        cells = {str(column.header): list(column.cells) for column in shown.columns}
        assert [*cells] == head
        assert cells["question type"] == ["price", "exact_match", "final_token", "rouge_l", "token_loss"]
        assert cells["token loss"] == ["1.5000", "", "", "", "1.2500"]
        assert all(cells[name] == ["0.5000", "0.5000", "0.6000", "0.7000", ""] for name in head[1:-1])
    (alone,) = _shown({"server": scores}, {"by_type": scores["by_type"], "count": 4})
    assert [str(column.header) for column in alone.columns] == ["question type", "exact match"]


@pytest.mark.parametrize(("lengths", "most"), [([3, 5], 32), ([3, 40], 40)])
def test_eval_generates_answers_as_long_as_the_longest_right_one(lengths, most):
    questions = SimpleNamespace(rows=SimpleNamespace(index=SimpleNamespace(answer=np.array(lengths))))
    assert answer_length(questions) == most
    assert answer_length(None) == 32


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
