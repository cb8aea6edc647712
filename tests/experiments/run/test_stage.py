"""Stages by tower: frozen parameters stay equal, and image features replace pictures if the image side is frozen."""

import dataclasses
import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distill
import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.blip2.frequency import CROSS_LAYERS
from antgmm_jax.io import checkpoint
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.io.placed import on_devices
from antgmm_jax.pure import abstract, functional, is_axes
from distill import LossConfig, StepConfig
from distill.adapters import with_adapters
from distill.align import state_sum
from distill.trainable import trainable
from experiments.run import features as image_side
from experiments.run import objectives
from experiments.run import stage as stages
from experiments.run.calibration import calibration_batches
from experiments.run.checks import check_steps
from experiments.run.folder import RunFolder
from experiments.run.pipeline import Run
from experiments.run.rows.datasets import encode_both, encoded, load_both, load_records
from experiments.run.schema import Stage, Work
from experiments.run.schema.recipe import load_recipe
from experiments.run.student import load_student
from experiments.run.student import whole as whole_model
from experiments.run.targets import targets_of
from pruning.costs import total_parameters
from tests.experiments.tiny import TOWERS, save_towers
from tests.pruning.models import CONFIGS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_towers(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="module")
def run(folder):
    made: list[tuple[int, int]] = []
    computed: list[tuple[str, str]] = []
    whole, step, pure = image_side.image_features, objectives.make_step, objectives.functional
    policies = {}

    def remembered(config, remat="dots"):
        model = pure(config, remat)
        policies[id(model)] = remat
        return model

    def counted(config, params, samples, directory, **about):
        made.append((about["shift"], len(samples)))
        return whole(config, params, samples, directory, **about)

    def noted(model, *arguments, dtype, **rest):
        computed.append((dtype.name, policies[id(model)]))
        return step(model, *arguments, dtype=dtype, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_side, "image_features", counted)
        patch.setattr(objectives, "make_step", noted)
        patch.setattr(objectives, "functional", remembered)
        scores = Run(load_recipe(folder / "recipe.toml"), folder / "run").scores()
    students = [load_student(path) for path in sorted((folder / "run" / "stages").iterdir())]
    return scores, students, made, computed


@pytest.fixture
def _unscored(monkeypatch):
    """Stages without scores, which a test does not read."""
    monkeypatch.setattr(Run, "_scores", lambda *_: {"exact_match": 0.0, "token_loss": 0.0, "by_type": {}})


@pytest.mark.long
def test_optimizer_state_exists_only_for_the_cut_model(folder, tmp_path):
    """Unless gates close first: then it is cut along with the parameters. Image features are not stored."""
    created, recipe = [], folder / "recipe.toml"
    begin = stages.init_state

    def noted(params, *about, **more):
        created.append(sum(leaf.size for leaf in jax.tree.leaves(params)))
        return begin(params, *about, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "init_state", noted)
        scores = Run(load_recipe(recipe, ["features=recompute"]), tmp_path / "run").scores()
    assert not (tmp_path / "run" / "cache" / "features").exists()
    image, language, final = created  # the second stage closes gates, the third cuts nothing
    assert final == scores["params"] < language == image < total_parameters(load_hf(folder / "teacher")[0])


def test_the_teacher_leaves_the_devices_after_its_cache_is_built(folder, tmp_path):
    recipe = load_recipe(folder / "recipe.toml")
    teacher, held = whole_model(folder / "teacher"), {id(array) for array in jax.live_arrays()}
    samples, _ = encode_both(recipe, load_both(recipe), load_processor(folder / "teacher"), teacher.config)
    run = RunFolder(tmp_path / "run")
    with run.opened(recipe):
        _, frozen = targets_of(recipe, teacher, "", samples, run, run.cache)
    gc.collect()
    left = [array for array in jax.live_arrays() if id(array) not in held]
    vocabulary = teacher.config.language.vocab * teacher.config.language.decoder.embed
    head = {id(leaf) for leaf in jax.tree.leaves(frozen())}
    assert sum(leaf.size for leaf in jax.tree.leaves(frozen())) < 3 * vocabulary
    assert sum(array.nbytes for array in left if id(array) not in head) < 1000


def same(first, second) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.long
def test_a_frozen_tower_stays_equal_and_the_others_change(run):
    _, (image, language, whole), *_ = run
    # The second stage cuts the output width of the bridge, so the last map is not compared.
    for part in ("queries", "norm", "stack"):
        assert same(image.load()["bridge"][part], language.load()["bridge"][part])
        assert not same(language.load()["bridge"][part], whole.load()["bridge"][part])
    assert same(image.load()["vision"], language.load()["vision"])
    assert not same(language.load()["vision"], whole.load()["vision"])
    assert not same(language.load()["language"], whole.load()["language"])


@pytest.mark.long
def test_the_first_stage_leaves_the_language_model_uncut(run):
    _, (image, *_), *_ = run
    assert sizes(image.config)["bridge/embed"] == 16
    assert image.keep["decoder/mlp"].shape[-1] == 48


@pytest.mark.long
def test_features_are_computed_once_and_only_for_a_frozen_image_side(run):
    _, _, made, _ = run
    assert made == [(0, 16)]


@pytest.mark.long
def test_a_stage_uses_its_dtype_and_remat_and_keeps_float32_parameters(run):
    _, (*_, whole), _, computed = run
    assert computed == [("float32", "dots")] * 3 + [("bfloat16", "full")]  # the second stage has two phases
    assert {leaf.dtype for leaf in jax.tree.leaves(whole.load())} == {np.dtype("float32")}


@pytest.mark.long
def test_a_stage_without_sizes_only_distils(run):
    _, (_, language, whole), *_ = run
    assert sizes(language.config) == sizes(whole.config)
    assert all(np.array_equal(index, whole.keep[axis]) for axis, index in language.keep.items())


@pytest.mark.long
def test_what_a_stage_cannot_do_is_refused(run, tmp_path):
    text = TOWERS.format(teacher=tmp_path)
    path = tmp_path / "recipe.toml"
    for change, fault in (
        ("stage.whole.mask_steps=1", "a stage without sizes needs"),
        ("stage.whole.recover_steps=0", "a stage without sizes needs"),
        ("stage.language.weights=random", "weights = 'random' cannot close units gradually"),
    ):
        path.write_text(text)
        with pytest.raises(AntgmmError, match=fault):
            load_recipe(path, [change])


@pytest.mark.long
@pytest.mark.usefixtures("_unscored")
def test_a_width_is_cut_to_components_and_the_run_resumes(folder, tmp_path):
    """Two stages; a run whose second stage is interrupted and resumed ends like an uninterrupted one."""
    turned = (
        '[{name = "image", sizes = {"vision/embed" = 16}, recover_steps = 1, '
        'importance = {"vision/embed" = "principal", "*" = "magnitude"}}, '
        '{name = "text", sizes = {"text/embed" = 16, "encoder/mlp" = 16}, recover_steps = 4, '
        'importance = {"text/embed" = "principal", "*" = "magnitude"}}]'
    )
    changes = [f"stage={turned}", 'teacher.states=["vision", "encoder"]', "loss.hidden=1.0", "loss.vision=1.0"]
    recipe = load_recipe(folder / "recipe.toml", changes)
    Run(recipe, tmp_path / "whole").scores()
    whole = load_student(tmp_path / "whole" / "stages" / "02-text")
    assert {axis: whole.keep[axis].shape for axis in ("vision/embed", "text/embed")} == {
        "vision/embed": (32, 16),
        "text/embed": (32, 16),
    }
    assert sizes(whole.config)["vision/embed"] == sizes(whole.config)["text/embed"] == 16

    # The first stage is finished in both.
    unfinished = shutil.ignore_patterns("02-text", "steps", ".lock")
    shutil.copytree(tmp_path / "whole", tmp_path / "halted", ignore=unfinished)
    train, stopped = stages.train, []

    def halting(step, state, batches, *, steps, **rest):
        if stopped:
            return train(step, state, batches, steps=steps, **rest)
        stopped.append(train(step, state, batches, steps=2, **rest))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "train", halting)
        with pytest.raises(KeyboardInterrupt):
            Run(recipe, tmp_path / "halted").scores()
        Run(recipe, tmp_path / "halted").scores()
    halted = load_student(tmp_path / "halted" / "stages" / "02-text")
    assert same(whole.load(), halted.load())
    assert same(whole.keep, halted.keep)


@pytest.mark.long
def test_a_width_cut_to_components_with_its_heads_starts_with_new_moments(folder, tmp_path):
    along = '{"vision/heads" = "magnitude", "*" = "principal"}'
    stage = f'{{name = "a", sizes = {{"vision/heads" = 1}}, importance = {along}, recover_steps = 2}}'
    changes = ["teacher.states=[]", "loss.vision=0.0", f"stage=[{stage}]"]
    _, _, after, place = as_cut(load_recipe(folder / "recipe.toml", changes), tmp_path / "run")
    assert (sizes(place.config)["vision/heads"], place.keep["vision/embed"].shape) == (1, (32, 16))
    assert not any(np.any(leaf) for _, tree in moments(after) for leaf in jax.tree.leaves(tree))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_are_cut_with_their_parameters(folder, tmp_path, kind):
    """After a mask phase a stage continues with the moments of the kept units."""
    units = '{"decoder/mlp" = 16, "text/embed" = 16, "bridge/layers" = 1}'
    stage = f'{{name = "a", sizes = {units}, mask_steps = 2, recover_steps = 1, importance = "magnitude"}}'
    changes = [f'optimizer.kind="{kind}"', "teacher.states=[]", "loss.vision=0.0", f"stage=[{stage}]"]
    before, place, after, _ = as_cut(load_recipe(folder / "recipe.toml", changes), tmp_path / "run")
    names = jax.tree_util.tree_leaves_with_path(functional(place.config).axes, is_leaf=is_axes)
    axes = {jax.tree_util.keystr(path): leaf_axes for path, leaf_axes in names}
    compared = 0
    for (_, old), (_, new) in zip(*(moments(state) for state in (before, after)), strict=True):
        left = dict(jax.tree_util.tree_leaves_with_path(new))
        for path, leaf in jax.tree_util.tree_leaves_with_path(old):
            leaf_axes = axes[jax.tree_util.keystr(path)]
            if CROSS_LAYERS not in leaf_axes:
                np.testing.assert_array_equal(left[path], taken(np.asarray(leaf), leaf_axes, place.plan))
                compared += bool(np.any(leaf) and left[path].shape != leaf.shape)
    assert compared > 20


def as_cut(recipe, folder):
    """State and place before and after the first cut of a run, which is stopped there."""
    seen, cut = [], stages.StageRun._cut

    def noted(self, state, place):
        seen.extend((state, place, *cut(self, state, place)))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.StageRun, "_cut", noted)
        with pytest.raises(KeyboardInterrupt):
            Run(recipe, folder).scores()
    return seen


def moments(state):
    """Trees of moments: Muon has one for the linear maps, AdamW two for the other parameters."""
    return [*optax.tree.get_all_with_path(state.opt_state, "mu"), *optax.tree.get_all_with_path(state.opt_state, "nu")]


def taken(leaf, leaf_axes, plan):
    """The units of a plan: first those chosen in each layer, then whole layers and widths."""
    for dim, axis in enumerate(leaf_axes):
        if axis in plan and plan[axis].ndim == 2:
            leaf = np.stack([np.take(one, row, axis=dim - 1) for one, row in zip(leaf, plan[axis], strict=True)])
    for dim, axis in enumerate(leaf_axes):
        if axis in plan and plan[axis].ndim == 1:
            leaf = np.take(leaf, plan[axis], axis=dim)
    return leaf


@pytest.mark.long
@pytest.mark.parametrize("axis", ["vision/embed", "text/embed"])
def test_states_in_all_components_equal_the_teachers(folder, axis):
    config, params = load_hf(folder / "teacher")
    recipe, params = load_recipe(folder / "recipe.toml"), on_devices(config, params, "float32")
    samples = encoded(recipe, load_records(recipe.data), load_processor(folder / "teacher"), config)
    (batch,) = calibration_batches(samples, batch_size=8, batches=1, seed=0)
    basis = pruning.principal(functional(config).apply, params, config, [batch], {axis: sizes(config)[axis]})
    turned, components = pruning.shrink(config, params, basis)
    names = ("vision/states", "encoder/states")
    teacher = functional(config).apply(params, batch, collect=names)
    student = functional(turned).apply(components, batch, collect=names)
    keep = pruning.compose(pruning.identity(config), basis)
    compared = [part for part in distill.parts(config, keep) if part.states in names]
    assert {(part.term, part.tower) for part in compared} >= {("vision", "vision"), ("hidden", "encoder")}
    for part in compared:
        arrays = (student[part.states], teacher[part.states])
        assert float(state_sum(part, *arrays, batch, {})) < 1e-6
        # Compared as channels instead of components, the states differ.
        if part.embed.ndim == 2:
            channels = part._replace(embed=np.arange(sizes(config)[axis]))
            assert float(state_sum(channels, *arrays, batch, {})) > 1


@pytest.mark.long
@pytest.mark.usefixtures("_unscored")
def test_repeated_rows_get_their_own_targets(folder, tmp_path):
    """Targets from a cache, read by row, equal those of the online teacher, computed from the batch."""
    changes = ["stage.image.repeat={price=5, brand=3}", "stage.image.recover_steps=1"]
    changes += ["stage.image.loss={hard=0.0,soft=1.0,vision=1.0}", "stage.image.optimizer.batch_size=4"]
    curves = []
    for mode in ("cache", "online"):
        recipe = load_recipe(folder / "recipe.toml", [*changes, f"teacher.mode={mode}"])
        recipe = recipe.model_copy(update={"stages": recipe.stages[:1]})
        Run(recipe, tmp_path / mode).scores()
        record = checkpoint.load_record(tmp_path / mode / "stages" / "01-image")
        curves.append([[point[name] for name in ("soft", "vision")] for point in record["metrics"]["history"]])
    # The cache holds bfloat16.
    np.testing.assert_allclose(*curves, rtol=2e-2)
    with pytest.raises(AntgmmError, match="stage 'image': no question has type prise: the data has brand, "):
        Run(load_recipe(folder / "recipe.toml", ["stage.image.repeat={prise=2}"]), tmp_path / "none").scores()


@pytest.mark.long
@pytest.mark.usefixtures("_unscored")
def test_an_online_teacher_reads_pictures_while_the_student_reads_features(folder, tmp_path):
    curves = []
    for mode in ("cache", "online"):
        # The student hardly moves: its steps would enlarge the difference of bfloat16 from step to step.
        changes = ["stage.image.recover_steps=1", f"teacher.mode={mode}", "optimizer.learning_rate=1e-9"]
        recipe = load_recipe(folder / "recipe.toml", changes)
        Run(recipe.model_copy(update={"stages": recipe.stages[:2]}), tmp_path / mode).scores()
        record = checkpoint.load_record(tmp_path / mode / "stages" / "02-language")
        curves.append([point["soft"] for point in record["metrics"]["history"]])
    # The cache holds bfloat16.
    np.testing.assert_allclose(*curves, rtol=1e-3)


def watched(train, seen):
    """A training loop that appends its batches, with targets, to `seen`."""

    def loop(step, state, batches, *, teacher, **rest):
        def kept(batch):
            seen.append(teacher.attach(batch))
            return seen[-1]

        return train(step, state, batches, teacher=teacher._replace(attach=kept), **rest)

    return loop


@pytest.mark.long
@pytest.mark.usefixtures("_unscored")
def test_shifted_pictures_get_the_targets_of_unshifted_ones(folder, tmp_path):
    first = []
    for shift in (0, 3):
        seen = []
        recipe = load_recipe(folder / "recipe.toml", [f"stage.image.shift={shift}", "stage.image.recover_steps=1"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "train", watched(stages.train, seen))
            Run(recipe.model_copy(update={"stages": recipe.stages[:1]}), tmp_path / str(shift)).scores()
        first.append(seen[0])
    (stood, moved), name = first, "teacher/bridge/states"
    np.testing.assert_array_equal(stood["index"], moved["index"])
    np.testing.assert_array_equal(stood[name], moved[name])
    assert not np.array_equal(stood["images"]["pixels"], moved["images"]["pixels"])


@pytest.mark.long
@pytest.mark.usefixtures("_unscored")
def test_a_stage_with_a_frozen_image_side_reads_features_of_shifted_views(folder, tmp_path):
    seen = []
    changed = ["stage.language.shift=1", "stage.image.recover_steps=1", "stage.language.recover_steps=9"]
    recipe = load_recipe(folder / "recipe.toml", [*changed, "stage.language.segments=1"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "train", watched(stages.train, seen))
        Run(recipe.model_copy(update={"stages": recipe.stages[:2]}), tmp_path / "run").scores()
    views = {}
    for batch in seen[1:]:
        for row, features in zip(batch["index"], batch["vision_features"], strict=True):
            views.setdefault(int(row), set()).add(features.tobytes())
    assert 1 < max(map(len, views.values())) <= 4


def test_a_shift_with_an_online_teacher_is_refused(folder):
    with pytest.raises(AntgmmError, match="stage 'image': an online teacher would read the shifted images"):
        load_recipe(folder / "recipe.toml", ["stage.image.shift=2", "teacher.mode=online"])


def test_rates_of_frozen_parameters_are_ignored():
    table = StepConfig(learning_rate=0.1, batch_size=4, rates={"vision/patch": 0.5, "language": 0.5})
    stage = Stage(name="a", recover_steps=2, frozen=("vision",), loss=LossConfig(), optimizer=table)
    params = {"vision": {"patch": np.ones(2, np.float32)}, "language": {"tokens": np.ones(2, np.float32)}}
    distill.init_state(params, stages.optimizer_of(stage, params))
    other = stage.model_copy(update={"frozen": (), "optimizer": dataclasses.replace(table, rates={"text": 0.5})})
    with pytest.raises(AntgmmError, match="stage 'a': rates of text matches no parameter"):
        check_steps(Work(1, "stage 'a'", other, "answers", 0), params, 8)


def test_rates_of_maps_with_adapters_are_those_of_the_adapters():
    """The step of a factor is in proportion to its rate; the usual set-up trains adapters alone."""
    params, table = abstract(CONFIGS["llava"]), StepConfig(learning_rate=0.1, batch_size=4, clip=float("inf"))
    alone = {"recover_steps": 2, "frozen": ("vision", "bridge"), "adapters": {"language": 2}, "loss": LossConfig()}
    held = with_adapters(jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params), {"language": 2}, jax.random.key(0))
    moved = {}
    for rates in ({}, {"language": 0.1, "vision": 3.0, "language/decoder/blocks/mlp": 0.5}):
        stage = Stage(name="a", optimizer=dataclasses.replace(table, rates=rates), **alone)
        check_steps(Work(1, "stage 'a'", stage, "answers", 0), params, 8)
        optimizer = stages.optimizer_of(stage, held)
        state = distill.init_state(held, optimizer)
        trained = trainable(held, optimizer.frozen)
        updates, _ = optimizer.transform.update(jax.tree.map(jnp.ones_like, trained), state.opt_state, trained)
        moved[len(rates)] = updates["adapters"]
    for path, factors in moved[0].items():
        ratio = 0.5 if "/mlp/" in path else 0.1
        np.testing.assert_allclose(moved[3][path]["a"], ratio * factors["a"], rtol=1e-5)


def test_a_training_phase_is_refused_as_a_stage(tmp_path):
    checkpoint.save_stage(tmp_path / "01-facts", {"params": {}}, {})
    with pytest.raises(AntgmmError, match="01-facts is a phase of antgmm train: specify a stage of antgmm compress"):
        load_student(tmp_path / "01-facts")


@pytest.mark.long
@pytest.mark.usefixtures("_unscored")
def test_bridge_tokens_are_weighted_by_the_teachers_sensitivity(folder, tmp_path):
    weights, losses = {}, {}
    parts = objectives.parts
    for tokens in ("alike", "sensitivity"):

        def noted(*about, bridge_weights, tokens=tokens):
            weights[tokens] = bridge_weights
            return parts(*about, bridge_weights=bridge_weights)

        loss = f'{{hard = 0.0, soft = 0.0, bridge = 1.0, bridge_tokens = "{tokens}"}}'
        stage = (
            f'{{name = "a", sizes = {{"vision/mlp" = 16}}, recover_steps = 2, importance = "magnitude", loss = {loss}}}'
        )
        recipe = load_recipe(folder / "recipe.toml", ["teacher.states=[]", f"stage=[{stage}]"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(objectives, "parts", noted)
            Run(recipe, tmp_path / tokens).scores()
        record = checkpoint.load_record(tmp_path / tokens / "stages" / "01-a")
        losses[tokens] = [point["loss"] for point in record["metrics"]["history"]]
    assert weights["alike"] is None and losses["alike"] != losses["sensitivity"]
    config, params = load_hf(folder / "teacher")
    samples = encoded(recipe, load_records(recipe.data), load_processor(folder / "teacher"), config, trained=True)
    seen = calibration_batches(samples, batch_size=8, batches=1, seed=0)
    expected = distill.bridge_weights(functional(config), on_devices(config, params, "float32"), seen)
    np.testing.assert_allclose(weights["sensitivity"], expected, rtol=1e-5)
    assert np.ptp(expected) > 0.1


def test_scores_of_zero_are_refused_before_a_cut(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        stages,
        "importance",
        lambda config, *_, **__: ({axis: 0 * gate for axis, gate in pruning.ones(config).items()}, {}),
    )
    stage = "{name='a', sizes={'vision/mlp'=16}, recover_steps=1, loss={hard=1.0, soft=0.0}}"
    recipe = load_recipe(folder / "recipe.toml", ["teacher.states=[]", "features=recompute", f"stage=[{stage}]"])
    with pytest.raises(AntgmmError, match="^vision/mlp: all importance scores are 0"):
        Run(recipe, tmp_path / "run").finish_stages()
