"""The reference of recipe keys is generated from the schema and up to date."""

from pathlib import Path

from distill import LossConfig, StepConfig
from experiments.run.schema import Recipe, Training
from experiments.run.schema.compress import EvaluateTwice, Teacher
from experiments.run.schema.reference import reference
from experiments.run.schema.stage import Stage
from experiments.run.schema.train import Model, Phase

COMMITTED = Path(__file__).resolve().parents[4] / "docs" / "reference" / "recipes.md"


def test_the_committed_reference_is_up_to_date():
    hint = "python -m experiments.run.schema.reference > docs/reference/recipes.md"
    assert COMMITTED.read_text(encoding="utf-8") == reference(), hint


def test_every_key_of_every_table_is_described():
    lines = reference().splitlines()
    for schema in (Recipe, Training, Stage, Phase, Teacher, Model, EvaluateTwice, LossConfig, StepConfig):
        for name, field in schema.__pydantic_fields__.items():
            row = [line for line in lines if line.startswith(f"| `{field.alias or name}` |")]
            assert row, (schema, name)
            assert all(len(line.rsplit("|", 2)[1]) > 8 for line in row), row


def test_ranges_defaults_and_values_are_listed():
    text = reference()
    assert '| `kind` | `"adamw"`, `"muon"` | `"adamw"` |' in text
    assert "| `learning_rate` | number above 0 | required | peak learning rate. |" in text
    assert "| `b2` | number above 0 below 1 | `0.999` |" in text
    assert "| `buckets` | list of integers | `[]` |" in text
    assert '| `importance` | table text -> `"taylor"`' in text
    assert "### `[[stage]]`\n" in text and "### `[evaluate.hard]`" not in text  # of the same kinds as [data]
