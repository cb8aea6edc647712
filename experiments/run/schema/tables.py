"""Tables and keys that recipes of both kinds have."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)

from data.record import check_template
from distill import StepConfig

Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


def _axis(name: str) -> str:
    if not re.fullmatch(r"[a-z]+/[a-z_]+", name):
        raise ValueError('an axis is written tower/dimension, as in "vision/mlp"')
    return name


def _size(value: Any) -> int | float:
    if type(value) is int and value >= 1:
        return value
    if type(value) is float and 0 < value <= 1:
        return value
    raise ValueError("give the number of units to keep, or a fraction such as 0.5")


Prompt = Annotated[str, AfterValidator(lambda text: text and check_template(text))]
Axis = Annotated[str, AfterValidator(_axis)]
Size = Annotated[int | float, PlainValidator(_size)]


class Table(BaseModel):
    """A table of a recipe or study: frozen, strict, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class MaadData(Table):
    """MAAD-synth, drawn when it is read.

    Attributes:
      kind: "maad".
      tier: "s", "m" or "full".
      split: "train", "val", "test" or "test_hard".
      samples: how many records; "train" goes on without end.
    """

    kind: Literal["maad"]
    tier: Literal["s", "m", "full"]
    split: Literal["train", "val", "test", "test_hard"] = "train"
    samples: Count


class FileData(Table):
    """Records of a user's own files.

    Attributes:
      kind: "jsonl" (with image files beside it), "parquet" or "webdataset".
      path: the file or folder.
      samples: how many records, the first ones; more than there are is refused.
    """

    kind: Literal["jsonl", "parquet", "webdataset"]
    path: str
    samples: Count


class TfdsData(Table):
    """Records of a prepared TensorFlow Datasets folder (array_record, read without TensorFlow).

    Attributes:
      kind: "tfds".
      path: the folder that holds `dataset_info.json`.
      split: a split of it.
      samples: how many records, the first ones; more than there are is refused.
    """

    kind: Literal["tfds"]
    path: str
    split: str
    samples: Count


Data = Annotated[MaadData | FileData | TfdsData, Field(discriminator="kind")]


class Evaluate(Table):
    """What the scores in the report are measured on.

    Attributes:
      data: what differs from the recipe's own [data]; other records than those.
      max_new_tokens: longest answer.
    """

    data: Data
    max_new_tokens: Count = 32


class Export(Table):
    """The Hugging Face folder that is written.

    Attributes:
      dtype: of its tensors.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class BaseRecipe(Table):
    """What recipes of both kinds say; `Training` tells what its keys mean."""

    data: Data
    optimizer: StepConfig
    evaluate: Evaluate
    export: Export = Export()
    seed: int = 0
    checkpoint_every: Count = 100
    buckets: tuple[Count, ...] = ()
    prompt_buckets: tuple[Count, ...] = ()
    pack: Annotated[int, Field(ge=0)] = 0
    prompt: Prompt = ""
    max_length: Count = 512
    max_answer: Count = 64

    @property
    def hard(self) -> "MaadData | FileData | TfdsData | None":
        """Harder records that are scored as well, if any."""
        return None

    @field_validator("buckets", "prompt_buckets")
    @classmethod
    def _ascending(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(f"{info.field_name} = {list(value)}: write each width once, the smallest first")
        return value

    @model_validator(mode="after")
    def _buckets_or_packed(self) -> Self:
        if self.buckets and self.pack:
            raise ValueError("buckets cut rows of one sample, pack fills rows with several: give one of the two")
        return self

    @model_validator(mode="after")
    def _evaluated_on_other_records(self) -> Self:
        for name in ("data", "hard"):
            test = getattr(self.evaluate, name, None)
            same = [getattr(self.data, key, "") == getattr(test, key, "") for key in ("kind", "path", "split")]
            if test is not None and all(same):
                raise ValueError(f"evaluate.{name} are the records of data; give another split or path")
        return self


def check_names(table: str, names: Sequence[str]) -> None:
    """Refuses a list of tables that is empty or names two alike.

    Args:
        table: what they are, for the error.
        names: theirs.

    Raises:
        ValueError: says which.
    """
    if not names:
        raise ValueError(f"there is no [[{table}]], nothing would be done")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two {table}s are named {name!r}")
