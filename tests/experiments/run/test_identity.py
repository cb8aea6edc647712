"""Steps and stages are bound to everything that decided them."""

from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint
from antgmm_jax.io.convert import load_hf
from distill import State
from experiments.run.export.publishing import check_replaceable
from experiments.run.schema.recipe import load_recipe
from experiments.run.start import decided_by
from experiments.run.stepper import Stepper
from experiments.run.student import teacher_key
from tests.experiments.tiny import save_llava, write_recipe


def test_a_step_of_another_stage_is_refused_before_it_is_read(tmp_path):
    data = SimpleNamespace(position={"epoch": 0}, seek=lambda position: None)
    state = State({"w": jnp.ones(2)}, (), jnp.asarray(3))
    ours = Stepper(tmp_path, data, "ours")
    ours.save(state, {"history": []})
    ours.finish()
    assert Stepper(tmp_path, data, "ours").record()["history"] == []
    with pytest.raises(AntgmmError, match="00000003 is a step of another run or stage: remove it and start again"):
        Stepper(tmp_path, data, "others").record()


@pytest.mark.parametrize("name", ["00000005.bak", "5", "00000005 (copy)"])
def test_a_copy_beside_the_steps_is_no_step(tmp_path, name):
    checkpoint.save_step(tmp_path, 4, {"w": jnp.ones(2)}, {})()
    (tmp_path / name).mkdir()
    (tmp_path / name / checkpoint.STEP_RECORD).write_text("{}")
    assert checkpoint.latest_step(tmp_path) == 4


def test_a_teacher_is_its_config_too(tmp_path):
    config, params = load_hf(save_llava(tmp_path / "model"))
    other = replace(config, language=replace(config.language, decoder=replace(config.language.decoder, eps=1e-3)))
    assert teacher_key(other, params) != teacher_key(config, params)
    assert teacher_key(replace(config), params) == teacher_key(config, params)


def test_stages_outside_a_run_are_inputs_of_it(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        checkpoint.save_stage(tmp_path / name, {"params": {"w": jnp.full(2, value)}}, {})
    path = write_recipe(tmp_path / "r.toml", tmp_path / "teacher")

    def digests(parent, weights):
        changes = [f'parent="{parent}"', f'stage.0.weights="{weights}"', "stage.0.mask_steps=0"]
        return decided_by(load_recipe(path, changes))

    assert digests("", "kept").keys() == digests("", "random").keys() == {"recipe"}
    first = digests(tmp_path / "a", tmp_path / "b")
    assert first.keys() == {"recipe", "parent", "weights_of_blocks"}
    assert digests(tmp_path / "b", tmp_path / "b")["parent"] == first["weights_of_blocks"] != first["parent"]


def test_later_stages_do_not_decide_a_stage(tmp_path):
    path = write_recipe(tmp_path / "r.toml", tmp_path / "teacher")
    with path.open("a") as file:
        file.write('[[stage]]\nname = "widths"\nrecover_steps = 2\nsizes = { "vision/mlp" = 16 }\n')
    one, other, first = (load_recipe(path, [f"stage.{stage}.recover_steps=3"]) for stage in ("0", "widths", "blocks"))
    assert decided_by(one) == decided_by(first) != decided_by(other)
    assert decided_by(other.until(1)) == decided_by(load_recipe(path).until(1)) != decided_by(one.until(1))


@pytest.mark.parametrize("name", [".git", ".hidden", "notes.txt"])
def test_files_of_others_in_an_export_are_kept(tmp_path, name):
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "qformer_tokenizer").mkdir()  # the second tokenizer of InstructBLIP
    check_replaceable(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(AntgmmError, match=f"{name} is no file of an export, which replaces .*: move it elsewhere"):
        check_replaceable(tmp_path)
