"""The prompt of a checkpoint that records none."""

import shutil
from math import inf

import pytest

import data.maad as maad
from data.record import PROMPT
from data.writers import write_jsonl
from experiments.auto import prompting
from experiments.auto.goal import Goal
from experiments.auto.look import FEWEST
from experiments.auto.prompting import TEMPLATES, about_prompts, chosen_prompt, prompt_losses
from experiments.auto.schedule import base, draft
from experiments.run.student import whole
from tests.experiments.own_data import ROOT, as_conversations


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(maad.source("m", "test", 64), file)
    return file


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The packaged teacher, which learnt the default prompt, without the file that records it."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    shutil.copytree(ROOT / "experiments/teachers/maad-m", folder, ignore=shutil.ignore_patterns("antgmm.json"))
    return folder


def drafted(model, file, **changes):
    test = {"kind": "jsonl", "path": str(file), "samples": 64}
    train = test | {"path": "not-read.jsonl"}
    return draft({**base(Goal(str(model), train, test), train, test), **changes})


@pytest.mark.long
def test_the_prompt_of_the_training_is_taken(teacher, rows):
    loads = []

    def load():
        loads.append(1)
        return opened.load()

    opened = whole(teacher)
    loaded = opened._replace(weights=load).loaded_once("float32")
    losses = prompt_losses(drafted(teacher, rows), loaded)
    loaded.weights()
    assert loads == [1]
    assert [*losses] == [*TEMPLATES]
    assert chosen_prompt(losses) == PROMPT == min(losses, key=losses.__getitem__)
    (line,) = about_prompts(losses)
    assert line.startswith(f'prompt "{PROMPT}": the checkpoint records none; the loss on held-out rows is ')
    assert f'{losses["[{text} ]{question}"]:.3f} for "[{{text}} ]{{question}}"' in line


def test_a_short_plan_compares_prompts_on_fewer_rows(teacher, rows, monkeypatch):
    counts = []

    def loss(config, params, samples, **_):
        counts.append(len(samples))
        return 1.0

    monkeypatch.setattr(prompting, "token_loss", loss)
    for seconds, number in ((1e-9, FEWEST), (inf, 64)):
        counts.clear()
        prompt_losses(drafted(teacher, rows), whole(teacher).loaded_once("float32"), seconds)
        assert counts == [number] * len(TEMPLATES)


def test_another_prompt_is_taken_if_it_is_clearly_better():
    others = dict.fromkeys(TEMPLATES, 2.0)
    assert chosen_prompt(others) == PROMPT
    assert chosen_prompt(others | {TEMPLATES[1]: 1.7, TEMPLATES[2]: 1.8}) == PROMPT
    assert chosen_prompt(others | {TEMPLATES[1]: 1.5, TEMPLATES[2]: 1.4}) == TEMPLATES[2]


def test_there_is_nothing_to_choose_where_the_prompt_is_known(teacher, rows, tmp_path):
    model = whole(teacher)
    assert prompt_losses(drafted(ROOT / "experiments/teachers/maad-m", rows), model) == {}
    assert prompt_losses(drafted(teacher, rows, prompt="{question}"), model) == {}
    shutil.copytree(rows.parent, tmp_path, dirs_exist_ok=True)
    as_conversations(tmp_path / rows.name)
    assert prompt_losses(drafted(teacher, tmp_path / rows.name), model) == {}
    assert not [*about_prompts({})]
