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

from antgmm_jax.config import Remat
from data.record import check_template

Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
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
      seed: another seed is another data set.
    """

    kind: Literal["maad"]
    tier: Literal["s", "m", "full"]
    split: Literal["train", "val", "test", "test_hard"] = "train"
    samples: Count
    seed: int = 0


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


class Optimizer(Table):
    """AdamW or Muon with clipping and a schedule that runs once over a stage or a phase.

    Attributes:
      kind: "adamw", or "muon", which orthogonalizes the updates of linear maps and leaves the rest to AdamW: fewer
        steps to the same loss, each a little dearer.
      learning_rate: the peak.
      schedule: "cosine" or "linear" decay to `floor`, or "constant".
      warmup: steps of linear rise.
      floor: final rate as a fraction of the peak.
      weight_decay: per unit of learning rate; norms and biases are spared.
      clip: largest global norm of the gradient.
      b2: decay of Adam's second moments; lower follows a loss that changes in jumps.
      rates: path prefix of parameters ("vision", "vision/patch") -> factor of their learning rate; the longest prefix
        decides.
      batch_size: samples of one optimizer step; rows of them where the recipe has `pack`.
      accumulate: pieces that the batch is taken in, one after another; divides `batch_size`.
      dtype: what the model is computed in; parameters, moments, norms and losses stay float32. "bfloat16" is for
        accelerators: a CPU is no faster with it. The recipe's own is also an online teacher's.
      remat: what the student's layers keep for the backward pass, the rest being computed again: "none" all, "dots"
        matrix products, "full" their input alone, for the least memory.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 0
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    b2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    rates: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    batch_size: Count
    accumulate: Count = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "dots"

    @model_validator(mode="after")
    def _whole_pieces(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate = {self.accumulate} does not divide batch_size = {self.batch_size}")
        return self

    def pieces(self, batches: int) -> dict[str, int]:
        """As many rows as so many batches have, in the pieces that the memory holds.

        Args:
          batches: of `batch_size` rows.

        Returns:
          `batch_size` and `batches`.
        """
        return {"batch_size": self.batch_size // self.accumulate, "batches": batches * self.accumulate}


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
    optimizer: Optimizer
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
