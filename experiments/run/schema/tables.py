"""Tables and keys of both kinds of recipes."""

import os
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

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

from data.limits import LONGEST_ANSWER, MOST_TOKENS
from data.record import check_template
from distill import StepConfig

LARGEST = (1 << 31) - 1
"""Of whole numbers, so that they fit into 32 bits."""
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
AnswerTokens = Annotated[int, Field(ge=1, le=LONGEST_ANSWER)]
TooLong = Literal["refuse", "drop"]
Take = Literal["first", "spread"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


def _axis(name: str) -> str:
    if not re.fullmatch(r"[a-z]+/[a-z_]+", name):
        raise ValueError('must be an axis tower/dimension, such as "vision/mlp"')
    return name


def _size(value: Any) -> int | float:
    if type(value) is int and value >= 1:
        return value
    if type(value) is float and 0 < value <= 1:
        return value
    raise ValueError("must be the number of units to keep, or a fraction such as 0.5")


Prompt = Annotated[str, AfterValidator(lambda text: text and check_template(text))]
Axis = Annotated[str, AfterValidator(_axis)]
Size = Annotated[int | float, PlainValidator(_size)]


class Table(BaseModel):
    """Base class of the tables of recipes and studies: frozen and strict, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class MaadData(Table):
    """MAAD-synth, generated on access.

    Attributes:
      kind: "maad".
      tier: "s", "m" or "full".
      split: "train", "val", "test" or "test_hard".
      samples: number of records; unlimited for "train".
    """

    kind: Literal["maad"]
    tier: Literal["s", "m", "full"]
    split: Literal["train", "val", "test", "test_hard"] = "train"
    samples: Count


class FileData(Table):
    """Records of user files.

    Attributes:
      kind: "jsonl" (with image files), "parquet", "arrow" (a folder of `datasets.save_to_disk`) or "webdataset".
      path: the file, its folder or a pattern such as data/train-*.parquet; or hf:ORG/NAME/PATH, one of these in a data
        set of the Hub.
      images: folder that image paths are relative to and may not leave; "" for that of the file.
      samples: number of records; an error if there are fewer.
      take: which ones: "first", or "spread" for records at equal distances in the file.
      split: "test" for about a tenth of the rows, "train" for the others, "" for all. Rows of one image stay together.
      too_long: what happens to records that are longer than `max_length` or `max_answer`: "refuse" is an error, "drop"
        leaves them out and prints how many.
    """

    kind: Literal["jsonl", "parquet", "arrow", "webdataset"]
    path: str
    images: str = ""
    samples: Count
    take: Take = "first"
    split: Literal["", "train", "test"] = ""
    too_long: TooLong = "refuse"


class TfdsData(Table):
    """Records of a prepared TensorFlow Datasets folder (array_record, read without TensorFlow).

    Attributes:
      kind: "tfds".
      path: the folder with `dataset_info.json`.
      split: name of the split.
      samples: number of records; an error if there are fewer.
      take: "first" or "spread", as for files.
      too_long: "refuse" or "drop", as for files.
    """

    kind: Literal["tfds"]
    path: str
    split: str
    samples: Count
    take: Take = "first"
    too_long: TooLong = "refuse"


class PreparedData(Table):
    """Encoded records of `antgmm data prepare`, to train on.

    Attributes:
      kind: "prepared".
      path: the folder.
      samples: number of its records.
    """

    kind: Literal["prepared"]
    path: str
    samples: Count
    too_long: ClassVar[TooLong] = "refuse"


Data = Annotated[MaadData | FileData | TfdsData, Field(discriminator="kind")]
TrainingData = Annotated[MaadData | FileData | TfdsData | PreparedData, Field(discriminator="kind")]


class Evaluate(Table):
    """Evaluation for the scores in the report.

    Attributes:
      data: differences from the top-level [data]; it must specify other records.
      max_new_tokens: maximum length of answers.
    """

    data: Data
    max_new_tokens: AnswerTokens = 32


class Export(Table):
    """The exported Hugging Face folder.

    Attributes:
      dtype: dtype of its tensors.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class BaseRecipe(Table):
    """Keys of both kinds of recipes.

    Attributes:
      data: the records for training and importance scores.
      optimizer: settings of the train step; stages and phases override them.
      evaluate: evaluation for the scores.
      export: settings of the exported folder.
      seed: seed of new parameters, of the order of the data and of random importance.
      checkpoint_every: steps between step checkpoints.
      buckets: ascending widths of batches, for example [16, 32, 48]: of answers in a model with an encoder, else of
        whole rows including image tokens; longer rows are padded to the full width. A batch contains rows of one
        bucket, and each bucket is compiled separately. [] pads rows to the longest one with a similar number of
        image slots.
      prompt_buckets: ascending widths of prompts (including image tokens) in a model with an encoder; each pair of
        buckets is compiled separately.
      pack: tokens per row (including image tokens) in which to pack several independent samples; `batch_size` then
        counts rows. Only for models without an encoder, instead of buckets. 0 for one sample per row.
      prompt: prompt template with `{question}` and `{text}`; a part in square brackets around `{text}` is left out of
        records without a text. It is put into the processor's chat template, if there is one. "" for the template of
        the initial checkpoint (`antgmm.json` in its folder), or else "[text: {text} ]question: {question}".
      features: "disk" computes image features only once in stages that do not change the image side, and stores them in
        the folder of the run; "recompute" needs no disk.
      max_length: maximum number of prompt tokens, without image tokens; longer rows are an error.
      max_answer: maximum number of answer tokens, including the end token; longer rows are an error.
    """

    data: TrainingData
    optimizer: StepConfig
    evaluate: Evaluate
    export: Export = Export()
    seed: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    checkpoint_every: Count = 100
    buckets: tuple[Count, ...] = ()
    prompt_buckets: tuple[Count, ...] = ()
    pack: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    prompt: Prompt = ""
    features: Literal["disk", "recompute"] = "disk"
    max_length: Tokens = 512
    max_answer: AnswerTokens = 64

    @property
    def hard(self) -> "MaadData | FileData | TfdsData | None":
        """Hard test records, if any."""
        return None

    @field_validator("buckets", "prompt_buckets")
    @classmethod
    def _ascending(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(f"{info.field_name} = {list(value)}: widths must be unique and ascending")
        return value

    @model_validator(mode="after")
    def _buckets_or_packed(self) -> Self:
        if self.buckets and self.pack:
            raise ValueError(
                "buckets are for rows of one sample, pack puts several samples into a row: set only one of them"
            )
        return self

    @model_validator(mode="after")
    def _evaluated_on_other_records(self) -> Self:
        for name in ("data", "hard"):
            test = getattr(self.evaluate, name, None)
            if test is None or self.data.kind != test.kind:
                continue
            paths = {os.path.realpath(getattr(table, "path", "")) for table in (self.data, test)}
            splits = [getattr(table, "split", "") for table in (self.data, test)]
            whole = isinstance(test, FileData) and "" in splits
            if len(paths) == 1 and (splits[0] == splits[1] or whole):
                raise ValueError(f"evaluate.{name} are the records of data; use another split or path")
        return self


def check_names(table: str, names: Sequence[str]) -> None:
    """Checks that a list of tables is not empty and has unique names.

    Args:
        table: name of the table, for error messages.
        names: names of the entries.

    Raises:
        ValueError: there are no entries, or two with the same name.
    """
    if not names:
        raise ValueError(f"there is no [[{table}]]: add at least one")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two {table}s are named {name!r}")
