"""The folder of a run: what it belongs to, and when it may be removed."""

import pytest

from antgmm_jax.errors import AntgmmError
from experiments.run.folder import RunFolder, remove_unsaved
from experiments.run.schema.recipe import load_recipe
from tests.experiments.tiny import write_recipe


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(write_recipe(tmp_path / "r.toml", tmp_path / "teacher"))


def test_a_folder_resumes_only_with_the_same_teacher_and_data(tmp_path):
    run = RunFolder(tmp_path)
    run.bind(teacher="one", data="two")
    run.bind(teacher="one", data="two")
    with pytest.raises(AntgmmError, match="its data changed since its start: choose another folder or remove it"):
        run.bind(teacher="one", data="three")
    run.inputs.unlink()
    run.bind(teacher="three", data="four")  # nothing was made from the others yet
    run.inputs.unlink()
    run.stage(1, "a").mkdir(parents=True)
    with pytest.raises(AntgmmError, match=r"inputs\.json is missing, so the teacher and data .* are unknown"):
        run.bind(teacher="one", data="two")


def test_a_folder_that_another_process_uses_is_not_removed(recipe, tmp_path):
    path = tmp_path / "run"
    with RunFolder(path).opened(recipe):
        assert not remove_unsaved(path)  # as after the refusal of a second command
        assert path.exists()
    assert remove_unsaved(path)
    assert not path.exists()
    with RunFolder(path).opened(recipe):
        RunFolder(path).stage(1, "a").mkdir(parents=True)
    assert not remove_unsaved(path) and not remove_unsaved(tmp_path / "none")
