"""The task for lmms-eval: its functions as that loads them, from the written folder alone."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from antgmm_jax.errors import AntgmmError
from data.harness import write_task
from data.metrics import normal, scores
from data.record import Record, Turn

IMAGES = tuple(np.full((4, 6, 3), 80 * number, np.uint8) for number in range(3))
RECORDS = [
    Record(images=IMAGES[:2], question="which is dark?", text="two of them", answer="The  First", type="a", id="r0"),
    Record(images=(), question="what?", answer="nothing", type="b"),
    Record(
        images=IMAGES[2:],
        question="so?",
        answer="grey",
        type="b",
        turns=(
            Turn("system", ("brief",)),
            Turn("user", ("see", None)),
            Turn("assistant", ("ok",)),
            Turn("user", ("so?",)),
        ),
    ),
]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "ads_test"
    assert write_task(RECORDS, folder, "Q[ of {text}]: {question}", max_new_tokens=7) == "ads_test"
    spec = importlib.util.spec_from_file_location("functions", folder / "functions.py")
    functions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(functions)
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda _, node: getattr(functions, node.value.removeprefix("functions.")))
    fields = yaml.load((folder / "ads_test.yaml").read_text(), loader)
    rows = [json.loads(line) for line in Path(fields["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    return fields, rows


def test_rows_have_the_prompt_of_training_and_their_images(task):
    fields, rows = task
    assert [fields["doc_to_text"](row) for row in rows] == ["Q of two of them: which is dark?", "Q: what?", "so?"]
    for row, record in zip(rows, RECORDS, strict=True):
        shown = fields["doc_to_visual"](row)
        assert len(shown) == len(record.images)
        for one, image in zip(shown, record.images, strict=True):
            np.testing.assert_array_equal(np.asarray(one), image)
    assert fields["task"] == "ads_test"
    assert fields["generation_kwargs"] == {"max_new_tokens": 7, "until": [], "temperature": 0, "do_sample": False}
    assert [row[fields["doc_to_target"]] for row in rows] == [record.answer for record in RECORDS]


def test_a_conversation_keeps_its_turns(task):
    fields, rows = task
    turns = fields["doc_to_messages"](rows[2])
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    text, image = turns[1]["content"]
    assert text == {"type": "text", "text": "see"}
    np.testing.assert_array_equal(np.asarray(image["url"]), IMAGES[2])


def test_scores_are_those_of_our_metrics(task):
    fields, rows = task
    answers = ["the first", "Nothing ", "green"]
    results = [fields["process_results"](row, [answer]) for row, answer in zip(rows, answers, strict=True)]
    first, second = fields["metric_list"]
    ours = scores([record.type for record in RECORDS], answers, [record.answer for record in RECORDS])
    assert first["aggregation"]([result["exact_match"] for result in results]) == ours["exact_match"] == 0.75
    assert np.mean([result["exact_match_micro"] for result in results]) == ours["exact_match_micro"]
    assert normal("The  First") == normal(answers[0])
    assert (first["metric"], second["metric"]) == ("exact_match", "exact_match_micro")


@pytest.mark.parametrize("name", ["null", "12", "on"])
def test_a_name_is_a_text_also_where_yaml_reads_another_type(tmp_path, name):
    write_task(RECORDS, tmp_path / name, "{question}", max_new_tokens=7)
    assert f'\ntask: "{name}"\n' in (tmp_path / name / f"{name}.yaml").read_text()


def test_a_folder_that_is_no_name_of_a_task_is_refused(tmp_path):
    with pytest.raises(AntgmmError, match="use letters, digits, _ and - only"):
        write_task(RECORDS, tmp_path / "my task", "{question}", max_new_tokens=1)
    with pytest.raises(AntgmmError, match="exists: choose another name"):
        write_task(RECORDS, tmp_path, "{question}", max_new_tokens=1)
    with pytest.raises(AntgmmError, match="there are no rows to write"):
        write_task([], tmp_path / "none", "{question}", max_new_tokens=1)
