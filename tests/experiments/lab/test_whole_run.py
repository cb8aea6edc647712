"""The plan of a whole run equals sizes that are known otherwise, and what does not fit is refused with a remedy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruning
from antgmm_jax.axes import to_dict
from antgmm_jax.config import IMAGE_SIDE
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint
from antgmm_jax.presets import preset
from antgmm_jax.pure import abstract
from distill.trainable import by_path
from experiments.lab.planning import compilers, whole_run
from experiments.lab.planning import phases as every_phase
from experiments.lab.planning.chips import CHIPS
from experiments.lab.planning.phase import Load, Phase
from experiments.lab.planning.phases import _spec, phases
from experiments.lab.planning.step import Step, StepSpec, stays
from experiments.run.cuts import planned as pruned
from experiments.run.narrow import narrow_of
from experiments.run.schema.recipe import load_any
from pruning.costs import forward_flops, total_parameters
from tests.marks import long

CONFIG = preset("llava-tiny")
RECIPE = """
calibration_batches = 2
max_length = 14
max_answer = 6
teacher.path = "nowhere"
data = { kind = "jsonl", path = "train.jsonl", samples = 50 }
loss = { hard = 0.5, soft = 1.0, temperature = 2.0 }
optimizer = { learning_rate = 5e-4, batch_size = 8, dtype = "bfloat16" }
evaluate = { max_new_tokens = 5, data = { path = "test.jsonl", samples = 16 } }

[[stage]]
name = "cut"
importance = "taylor"
mask_steps = 1
recover_steps = 9
sizes = { "text/layers" = 4, "text/mlp" = 0.5 }

[[stage]]
name = "settle"
frozen = ["vision", "bridge"]
recover_steps = 20
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.mark.long
def test_phases_have_the_sizes_of_their_arrays(recipe, antgmm):
    plan = ("plan", recipe, "--preset", "llava-tiny", "--mesh", "fsdp=1")
    figures = json.loads(antgmm(*plan, "--chip", "v5e", "--compiler", "cpu", "--json").stdout)
    assert (figures["length"], figures["answer"]) == (14 + CONFIG.image_tokens, 6)
    phases = {each["phase"]: each for each in figures["phases"]}
    cut, settle = "stage 'cut': ", "stage 'settle': "
    assert [*phases] == [
        *("loading", "teacher cache"),
        *(cut + name for name in ("importance", "start", "step", "scores")),
        *(settle + name for name in ("image features", "start", "step", "scores")),
        *("check of the export", "report"),
    ]
    whole = total_parameters(CONFIG)
    small = json.loads(antgmm("cost", "--preset", "llava-tiny", "--json").stdout)
    assert phases["loading"]["memory"] == {"model": 2 * whole, "total": 2 * whole}
    # Each row has its answer's final states in bfloat16, and its length.
    assert phases["teacher cache"]["disk"] == 50 * (6 * 2 * CONFIG.language.decoder.embed + 4)
    assert phases["teacher cache"]["host"] == phases["teacher cache"]["disk"]
    # Gates close before the first cut: the whole model is trained, with two moments for each parameter.
    assert phases[f"{cut}start"]["memory"]["parameters"] == 4 * whole
    assert phases[f"{cut}start"]["memory"]["moments"] == pytest.approx(8 * whole, rel=1e-3)
    state = phases[f"{cut}step"]["memory"]["parameters"] + phases[f"{cut}step"]["memory"]["moments"]
    assert phases[f"{cut}step"]["disk"] == 3 * state + 4 * whole
    # A copy of the state for the checkpoint, and eight batches that the loader makes ahead.
    assert phases[f"{cut}step"]["host"] == state + 8 * phases[f"{cut}step"]["memory"]["batch"]
    features = 2 * 50 * CONFIG.image_tokens * CONFIG.vision.stack.embed
    assert phases[f"{settle}image features"]["disk"] == features
    # Frozen parameters have no moments.
    assert phases[f"{settle}start"]["memory"]["moments"] < 2 * phases[f"{settle}start"]["memory"]["parameters"]
    assert phases["report"]["memory"]["teacher"] == 2 * whole
    assert small["params"] == whole
    for name, each in phases.items():
        assert each["compiled"] == (name.split(": ")[-1] not in ("loading", "start", "check of the export", "report"))
        assert not each["compiled"] or each["memory"]["temporaries"] > 0
        assert not each["sent"]  # one device
    assert phases[f"{cut}step"]["seconds"] == pytest.approx(phases[f"{cut}step"]["flops"] / CHIPS["v5e"].flops)


@pytest.mark.long
@pytest.mark.parametrize(
    ("importance", "passes"),
    [
        ('"taylor"', 3),
        ('{ "*/layers" = "block_influence", "*" = "activation" }', 2),
        ('{ "*/layers" = "last", "text/embed" = "principal", "*" = "magnitude" }', 1),
        ('"magnitude"', 0),
    ],
)
def test_importance_passes_over_the_calibration_batches_once_a_method(recipe, importance, passes):
    """Taylor scores also differentiate; the last two methods read no data."""
    text = RECIPE.replace('importance = "taylor"', f"importance = {importance}")
    recipe.write_text(
        text.replace('"text/mlp" = 0.5', '"text/embed" = 0.5').replace("mask_steps = 1", "mask_steps = 0")
    )
    load = Load({"data": 1, "fsdp": 1, "tensor": 1}, "", 14 + CONFIG.image_tokens, 6)
    first = next(each for each in phases(load_any(recipe), CONFIG, load) if each.name.startswith("stage"))
    assert first.name == f"stage 'cut': {'importance' if passes else 'start'}"
    if passes:
        forward = forward_flops(CONFIG, 16, load.length + load.answer, logits=load.answer)
        assert first.flops == passes * sum(forward.values())
        assert first.memory["temporaries"] > 0


@pytest.mark.parametrize("mode", [long("online"), "cache"])
def test_a_stage_that_compares_the_output_of_the_bridge_needs_the_teacher_or_its_states(tmp_path, mode):
    """The recommended first stage: the teacher is in the step, or the output of its bridge is in the cache."""
    changes = ["stage.cut.loss={hard=0.0,soft=0.0,bridge=1.0}", "stage.cut.sizes={'vision/mlp'=0.5}"]
    changes += ["stage.cut.importance=magnitude", "stage.settle.loss.soft=0.0", f"teacher.mode={mode}"]
    changes += ["stage.cut.loss.bridge_tokens=sensitivity"]
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("mask_steps = 1", "mask_steps = 0"))
    load = Load({"data": 1, "fsdp": 1, "tensor": 1}, "", 14 + CONFIG.image_tokens, 6)
    planned = {each.name: each for each in phases(load_any(tmp_path / "recipe.toml", changes), CONFIG, load)}
    step, weights = planned["stage 'cut': step"], planned["stage 'cut': image tokens"]
    # Gradients pass 2 batches of 8 rows through the whole teacher.
    assert weights.memory["teacher"] == 2 * total_parameters(CONFIG) and weights.memory["temporaries"] > 0
    passes = forward_flops(CONFIG, 16, load.length + load.answer, logits=load.answer)
    assert weights.flops == 2 * sum(passes.values()) - passes["vision"] - passes["bridge"]
    states = CONFIG.image_tokens * CONFIG.language.decoder.embed
    assert step.memory["teacher"] == (2 * total_parameters(CONFIG) if mode == "online" else 0)
    if mode == "cache":
        # bfloat16 states of one image, and the number of images.
        assert planned["teacher cache"].disk == 50 * (2 * states + 4)
    passes = forward_flops(CONFIG, 8, load.length)
    assert step.flops < 9 * 4 * (passes["vision"] + passes["bridge"])  # nine steps that run no language model
    assert planned["stage 'settle': step"].memory["teacher"] == 0


def test_the_stages_after_a_parent_begin_with_its_sizes_and_dtypes(recipe, tmp_path, monkeypatch):
    small = pruned(CONFIG, load_any(recipe).stages[0], {"vision/mlp": CONFIG.vision.stack.mlp // 2})
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract(small))
    params["language"] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["language"])
    record = {"config": to_dict(small), "keep": pruning.identity(small), "teacher": "a digest"}
    checkpoint.save_stage(tmp_path / "01-image", {"params": params}, record)
    monkeypatch.setattr(whole_run, "describe", lambda _: (CONFIG, abstract(CONFIG)))
    made = whole_run.opened(recipe, [f"parent={tmp_path / '01-image'}", "stage.cut.frozen=['language']"])
    assert (made.config, made.start) == (CONFIG, small)
    language = total_parameters(CONFIG) - image_side(CONFIG)
    assert sum(leaf.size for path, leaf in by_path(abstract(small))[0].items() if path in made.narrow) == language
    begun = []
    for name in ("_cache", "_check", "_report"):
        monkeypatch.setattr(every_phase, name, lambda *_: Phase("", {}))
    monkeypatch.setattr(every_phase, "_stage", lambda *about: begun.append(about[2:4]) or ())
    [*whole_run.planned(made, Load({"data": 1, "fsdp": 1, "tensor": 1}, "", 24, 6), "", str)]
    assert begun[0] == (small, CONFIG) and begun[1][0] != begun[0][0]


@pytest.mark.long
def test_parameters_that_no_stage_has_trained_stay_in_the_two_bytes_of_their_files(tmp_path):
    """The second stage gets the image side of the first one in float32."""
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("mask_steps = 1", "mask_steps = 0"))
    changes = ["stage.cut.sizes={'vision/mlp'=0.5}", "stage.cut.importance=magnitude", "stage.cut.frozen=['language']"]
    recipe = load_any(tmp_path / "recipe.toml", [*changes, "stage.settle.adapters={'language/decoder/blocks/mlp'=2}"])
    files = narrow_of(abstract(CONFIG, jnp.bfloat16))
    load = Load({"data": 1, "fsdp": 1, "tensor": 1}, "", 14 + CONFIG.image_tokens, 6, narrow=files)
    cut, settle = (each.memory for each in phases(recipe, CONFIG, load) if each.name.endswith(": start"))
    small = pruned(CONFIG, recipe.stages[0], {"vision/mlp": CONFIG.vision.stack.mlp // 2})
    whole, language = total_parameters(small), total_parameters(CONFIG) - image_side(CONFIG)
    assert cut["parameters"] == 4 * (whole - language) + 2 * language
    layers, width, units = CONFIG.language.decoder.layers, CONFIG.language.decoder.embed, CONFIG.language.decoder.mlp
    maps, factors = 3 * layers * width * units, 3 * layers * 2 * (width + units)
    assert settle["parameters"] == 4 * (whole - maps + factors) + 2 * maps


def image_side(config):
    params = abstract(config)
    return sum(leaf.size for name in IMAGE_SIDE for leaf in jax.tree.leaves(params[name]))


def test_states_of_towers_and_the_most_probable_tokens_are_inputs_of_the_step(tmp_path):
    """A batch of 8 rows has the cached states of 2 bytes each: before each layer, behind the last one, and final."""
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("mask_steps = 1", "mask_steps = 0"))
    mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    load = Load(mesh, "", 14 + CONFIG.image_tokens, 6)

    def size(*changes):
        recipe = load_any(tmp_path / "recipe.toml", ["stage.cut.importance=magnitude", *changes])
        return stays(_spec(recipe, recipe.work[0], CONFIG, CONFIG, load), mesh)

    plain, compared = size(), size("stage.cut.loss={hidden=1.0,vision=1.0}", "teacher.states=['vision','text']")
    vision, text = CONFIG.vision, CONFIG.language.decoder
    states = (vision.stack.layers + 1) * vision.tokens * vision.stack.embed
    states += (text.layers + 1) * (load.length + load.answer) * text.embed
    assert compared - plain == 8 * 2 * states
    # 4 tokens of 4 bytes and 5 probabilities of 2 take the place of a final state, and of the teacher's head.
    head = 2 * CONFIG.language.vocab * text.embed
    assert plain - size("teacher.top=4") == 8 * load.answer * (2 * text.embed - 26) + head


def test_the_least_time_of_a_phase_by_hand():
    phase = Phase("step", {}, sent=10**12, flops=989e12)
    # 1 s of products; 450 GB/s inside a machine, 50 GB/s between machines.
    assert phase.least("H100", 8) == pytest.approx(1e12 / 450e9)
    assert phase.least("H100", 16) == pytest.approx(1e12 / 50e9)
    assert phase._replace(sent=1).least("H100", 16) == pytest.approx(1.0)


SPEC = StepSpec(CONFIG, CONFIG, 8, 24, 8)


@pytest.mark.parametrize(
    ("phase", "remedy"),
    [
        (Phase("check of the export", {"student": 9}), "it runs on one device, so no mesh helps: choose a chip with"),
        (Phase("teacher cache", {"teacher": 17}), "about --mesh fsdp=8 is sufficient"),
        (Phase("step", {"parameters": 9}, spec=SPEC), 'optimizer.remat = "full" is sufficient'),
        (
            Phase("step", {"parameters": 9}, spec=SPEC._replace(remat="full")),
            "the smallest sufficient mesh is --mesh fsdp=4",
        ),
    ],
)
def test_a_phase_that_does_not_fit_is_refused_with_what_would(phase, remedy, monkeypatch):
    def compiled(spec, mesh, chip):
        return Step(dict(mesh), {"parameters": 4 if spec.remat == "full" else 9}, 0.0, 0.0, {})

    def smallest(spec, mesh, memory, chip):
        return Step({"data": 1, "fsdp": 4, "tensor": 1}, {"parameters": 3}, 0.0, 0.0, {})

    monkeypatch.setitem(CHIPS, "v5e", CHIPS["v5e"]._replace(memory=5.0))
    monkeypatch.setattr(whole_run, "phases", lambda *_: iter([Phase("loading", {"model": 5}), phase]))
    monkeypatch.setattr(whole_run, "compiled", compiled)
    monkeypatch.setattr(whole_run, "smallest", smallest)
    lines, made = [], whole_run.Opened(None, CONFIG, CONFIG, {})
    load = Load({"data": 1, "fsdp": 2, "tensor": 1}, "", 24, 8)
    with pytest.raises(AntgmmError) as error:
        [*whole_run.planned(made, load, "v5e", lines.append)]
    assert str(error.value).startswith(f"{phase.name} needs {phase.total / 1e9:.3g} GB per device, more than v5e has; ")
    assert remedy in str(error.value)
    assert str(error.value).endswith("if your longest row has fewer than 24 + 8 tokens, give --length and --answer")
    assert [line.split(":")[1] for line in lines] == [" loading", f" {phase.name}"]
    # Without a chip everything is printed.
    assert len([*whole_run.planned(made, load, "", lines.append)]) == 2


def test_a_report_that_does_not_fit_is_planned_without_its_times(monkeypatch):
    monkeypatch.setitem(CHIPS, "v5e", CHIPS["v5e"]._replace(memory=5.0))
    both = [Phase("loading", {"model": 5}), Phase("report", {"teacher": 9e9})]
    monkeypatch.setattr(whole_run, "phases", lambda *_: iter(both))
    lines, made = [], whole_run.Opened(None, CONFIG, CONFIG, {})
    load = Load({"data": 1, "fsdp": 2, "tensor": 1}, "", 24, 8)
    assert [*whole_run.planned(made, load, "v5e", lines.append)] == both
    assert lines[-1] == (
        "plan: report needs 9 GB per device, more than v5e has: it will say of its times that they are not measured"
    )


def test_a_recipe_is_planned_without_its_teacher_or_says_what_is_missing(recipe, antgmm, refused, monkeypatch):
    monkeypatch.setattr(compilers, "check", lambda chip: None)
    monkeypatch.setattr(
        whole_run, "phases", lambda recipe, config, load, start: iter([Phase(str(config == start == CONFIG), {"a": 1})])
    )
    shown = antgmm("plan", recipe, "--preset", "llava-tiny", "--mesh", "fsdp=2", "--set", "max_answer=7").stdout
    assert "recipe.toml on fsdp=2" in shown and "True" in shown and "7 answer" in " ".join(shown.split())
    assert "nowhere" in refused("plan", recipe, "--mesh", "fsdp=2")
    assert "unknown key" in refused("plan", recipe, "--preset", "llava-tiny", "--set", "max_answers=7")
    assert refused("plan", "absent.toml").startswith("cannot read the recipe absent.toml")
