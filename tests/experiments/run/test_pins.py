"""Names of the Hub in recipes, against a local mirror: their commits are stored when a run starts, and kept."""

import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import hub
from data.maad import source
from data.writers import write_parquet
from experiments.run import pins
from experiments.run.pipeline import Run
from experiments.run.schema import PreparedData
from experiments.run.schema.recipe import load_recipe, load_training
from tests.experiments.tiny import TRAINING, save_teacher, write_recipe
from tests.hub_mirror import mirrored

TEACHER, ROWS = "models/org/teacher", "datasets/org/rows"
CHANGES = [
    "teacher.path=hf:org/teacher",
    'data={kind="parquet", path="hf:org/rows/train.parquet", samples=16}',
    'evaluate.data={path="hf:org/rows/test.parquet", samples=8}',
    'stage=[{name="blocks", recover_steps=1, importance="magnitude", sizes={"vision/layers"=2}}]',
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a teacher and of a data set."""
    folder = tmp_path_factory.mktemp("files")
    save_teacher(folder / "teacher")
    for split, rows in (("train", 16), ("test", 8)):
        write_parquet(source("s", split, rows), folder / "rows" / f"{split}.parquet")
    return {
        name: {path.name: path.read_bytes() for path in (folder / name.rpartition("/")[2]).iterdir()}
        for name in (TEACHER, ROWS)
    }


@pytest.fixture
def mirror(files, tmp_path):
    with mirrored(files, tmp_path / "cache") as mirror:
        yield mirror


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(write_recipe(tmp_path / "recipe.toml", tmp_path / "unused"), CHANGES)


def paths(recipe):
    return recipe.teacher.path, recipe.data.path, recipe.evaluate.data.path


def test_names_get_commits_and_other_paths_stay(mirror, recipe):
    teacher, rows = mirror.commit(TEACHER), mirror.commit(ROWS)
    expected = (f"hf:org/teacher@{teacher}", f"hf:org/rows@{rows}/train.parquet", f"hf:org/rows@{rows}/test.parquet")
    pinned = pins.pinned(recipe, None)
    assert paths(pinned) == expected
    assert pins.pinned(pinned, None) == pinned
    local = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"path": "some/folder"})})
    assert pins.pinned(local, None).teacher.path == "some/folder"


def test_prepared_rows_are_not_looked_for_on_the_hub(mirror, recipe):
    changed = recipe.model_copy(update={"data": PreparedData(kind="prepared", path="hf:org/rows", samples=16)})
    assert pins.pinned(changed, None).data == changed.data


def test_earlier_commits_are_kept_for_names_without_a_revision(mirror, recipe):
    before = pins.pinned(recipe, None)
    mirror.files[TEACHER]["tokenizer_config.json"] += b" "
    hub._snapshot.cache_clear()
    assert paths(pins.pinned(recipe, before)) == paths(before)
    main = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"path": "hf:org/teacher@main"})})
    assert pins.pinned(main, before).teacher.path == f"hf:org/teacher@{mirror.commit(TEACHER)}" != before.teacher.path


def test_a_checkpoint_to_train_further_gets_its_commit(mirror, tmp_path):
    (tmp_path / "training.toml").write_text(TRAINING)
    training = load_training(tmp_path / "training.toml", ['model={path="hf:org/teacher"}'])
    assert pins.pinned(training, None).model.path == f"hf:org/teacher@{mirror.commit(TEACHER)}"


@pytest.mark.long
def test_a_run_of_names_stores_their_commits_and_resumes_with_them(mirror, recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    Run(recipe, run).finish_stages()
    stored = load_recipe(run / "recipe.toml")
    assert paths(stored) == paths(pins.pinned(recipe, None))
    # The repository changes, and then there is no network.
    mirror.files[TEACHER]["tokenizer_config.json"] += b" "
    hub._snapshot.cache_clear()
    requests = len(mirror.requests)
    monkeypatch.setenv(hub.OFFLINE, "1")
    Run(recipe, run).finish_stages()
    assert len(mirror.requests) == requests
    assert load_recipe(run / "recipe.toml") == stored


def test_a_name_that_cannot_be_downloaded_leaves_no_run(mirror, recipe, tmp_path):
    del mirror.files[TEACHER]
    with pytest.raises(AntgmmError, match="hf:org/teacher: there is no such public model on the Hub"):
        Run(recipe, tmp_path / "run").finish_stages()
    assert not (tmp_path / "run").exists()
