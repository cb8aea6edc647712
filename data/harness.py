"""A folder with a task for lmms-eval: rows in the prompt of training, their images, and functions that read them."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.folders import new_folder
from data import harness_functions
from data.record import Record, turns_of
from data.writers import write_lines

ROWS = "rows.jsonl"
_TASK = """\
# Written by `antgmm data lmms-eval`: lmms-eval --include_path {folder} --tasks {name} ...
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.images
doc_to_text: !function functions.prompt
doc_to_messages: !function functions.messages
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {tokens}
  until: []  # else lmms-eval cuts answers at their first empty line
  temperature: 0
  do_sample: false
process_results: !function functions.scored
metric_list:
  - metric: exact_match
    aggregation: !function functions.mean_over_types
    higher_is_better: true
  - metric: exact_match_micro
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_task(
    records: Sequence[Record],
    folder: Path,
    template: str,
    *,
    max_new_tokens: int,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> str:
    """Writes records as a task for lmms-eval, in a folder of their own with the images and the code.

    Args:
        records: at least one record.
        folder: new folder, named as the task. The task has its absolute path: write it again where it is moved to.
        template: prompt template of single questions.
        max_new_tokens: maximum length of an answer.
        progress: called with (file name, records done, number of records).

    Returns:
        Name of the task.

    Raises:
        AntgmmError: the folder exists or its name is no name of a task, there are no records, or a file cannot be
            written.
    """
    name = folder.name
    if not re.fullmatch(r"[\w-]+", name, re.ASCII):
        raise AntgmmError(f"{folder}: its name becomes the task's: use letters, digits, _ and - only")

    def line(row: int, record: Record, names: Sequence[str]) -> dict:
        turns = [
            {
                "role": turn.role,
                "content": [
                    {"type": "image", "text": ""} if part is None else {"type": "text", "text": part}
                    for part in turn.parts
                ],
            }
            for turn in turns_of(record, template)
        ]
        words = {"id": record.id, "type": record.type, "answer": record.answer}
        return {**words, "images": [*names], "messages": turns}

    if not len(records):
        raise AntgmmError(f"{folder}: there are no rows to write: name data that has some")
    with new_folder(folder) as hidden:
        write_lines(records, hidden / ROWS, line, progress)
        shutil.copyfile(harness_functions.__file__, hidden / "functions.py")
        place = folder.absolute()
        fields = {
            "name": name,
            "task": json.dumps(name),
            "folder": place,
            "rows": json.dumps(str(place / ROWS)),
            "tokens": max_new_tokens,
        }
        (hidden / f"{name}.yaml").write_text(_TASK.format(**fields), encoding="utf-8")
    return name
