"""What is said to a person stands as it was said."""

import json

from experiments.commands.output import emit
from experiments.run.host.console import bar, say, table

NAME = "runs/[red]a:m:b"


def test_names_are_neither_markup_nor_emoji(capsys):
    say(f"found complete in {NAME}")
    with bar(NAME, 1) as update:
        update(1, "done")
    emit({}, False, NAME, table(("folder", "score"), [(NAME, "1")]))
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"found complete in {NAME}", f"{NAME}: 1/1 done"]
    assert printed.out.count(NAME) == 2


def test_figures_are_json_alone(capsys):
    emit({"score": 1}, True, NAME)
    assert json.loads(capsys.readouterr().out) == {"score": 1}
