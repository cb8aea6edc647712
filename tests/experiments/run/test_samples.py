"""The processor of a checkpoint is loaded without running its code."""

import json

import pytest

from antgmm_jax.errors import AntgmmError
from experiments.run.samples import load_processor
from tests.experiments.tiny import save_teacher


def test_code_beside_a_processor_is_never_run(tmp_path):
    directory = save_teacher(tmp_path / "teacher")
    config = json.loads((directory / "processor_config.json").read_text())
    config["auto_map"] = {"AutoProcessor": "processing.Hostile"}
    (directory / "processor_config.json").write_text(json.dumps(config))
    (directory / "processing.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Hostile: pass\n")
    load_processor(directory)
    config["processor_class"] = "Hostile"
    (directory / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(AntgmmError, match="has no processor"):
        load_processor(directory)
    assert not (tmp_path / "ran").exists()
