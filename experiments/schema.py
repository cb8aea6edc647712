"""What a recipe may say: every table and key, its meaning and its range.

`Recipe` cuts and distils a trained model (`antgmm compress`), `Training` trains a teacher (`antgmm train`).
Tables under a stage, a phase or `evaluate` hold only what differs: `recipe.py` lays them over the table of the same
name at the top. Paths are relative to the folder that the command is started in.
"""

import fnmatch
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
from antgmm_jax.errors import AntgmmError

Method = Literal["taylor", "magnitude", "activation", "block_influence", "random", "last", "principal"]
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


class Teacher(Table):
    """The trained model: what is cut, and what the student learns from.

    Attributes:
      path: its Hugging Face folder.
      mode: "cache" computes its final hidden states at answer positions once; "online" runs it at every step.
      states: towers ("encoder", "vision") whose block states the `hidden` and `vision` losses compare; cached too under
        "cache". Exactly the recipes with such a loss name some.
      pairs: further records to train on, pictures of the samples with other samples' questions, which the teacher
        answers once; 0 for none.
    """

    path: str
    mode: Literal["cache", "online"] = "cache"
    states: tuple[Name, ...] = ()
    pairs: Annotated[int, Field(ge=0)] = 0


class Loss(Table):
    """Weights of the loss terms, which `distill.losses` defines; a term of weight 0 is not computed.

    Attributes:
      hard: cross-entropy against the label.
      soft: divergence from the teacher's distribution at `temperature`.
      pair: margin of the label over the two largest logits.
      rank: order of the teacher's `rank_top` largest logits.
      hidden: block states at text tokens.
      vision: block states at image tokens.
      bridge: what the bridge hands to the language model.
      bridge_tokens: "alike" weighs all tokens of it alike, "sensitivity" by how much the teacher's answers depend on
        each.
      temperature: softmax temperature of `soft`.
      direction: "forward" is KL(teacher || student), "reverse" the other way.
      rank_top: how many logits `rank` orders.
    """

    hard: Weight = 1.0
    soft: Weight = 0.0
    pair: Weight = 0.0
    rank: Weight = 0.0
    hidden: Weight = 0.0
    vision: Weight = 0.0
    bridge: Weight = 0.0
    bridge_tokens: Literal["alike", "sensitivity"] = "alike"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    direction: Literal["forward", "reverse"] = "forward"
    rank_top: Annotated[int, Field(ge=2)] = 4

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if not any((self.hard, self.soft, self.pair, self.rank, self.hidden, self.vision, self.bridge)):
            raise ValueError("every weight is 0, nothing would be trained")
        if self.bridge_tokens != "alike" and not self.bridge:
            raise ValueError(f"bridge_tokens = {self.bridge_tokens!r} weighs nothing: give bridge a weight")
        return self

    @property
    def reads_answers(self) -> bool:
        """Whether a term reads the language model's output or states: all but those of image tokens do."""
        return bool(self.hard or self.soft or self.pair or self.rank or self.hidden)

    @property
    def reads_teacher(self) -> bool:
        """Whether a term compares with the teacher; `hard` and `pair` read labels alone."""
        return bool(self.soft or self.rank or self.hidden or self.vision or self.bridge)


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
        accelerators: a CPU is no faster with it.
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
    rates: dict[str, Annotated[float, Field(gt=0)]] = {}
    batch_size: Count
    accumulate: Count = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "dots"

    @model_validator(mode="after")
    def _whole_pieces(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate = {self.accumulate} does not divide batch_size = {self.batch_size}")
        return self


class Stage(Table):
    """One cut and its distillation.

    The way to the target sizes is gone in `segments` equal parts. In each, gates close over `mask_steps` steps, the
    closed units are removed, and the smaller model is distilled for `recover_steps` steps.

    Attributes:
      name: names the stage's folder.
      sizes: axis -> units to keep, or (with a decimal point) the fraction of the units that the stage finds; none: the
        stage only distils.
      importance: which units go first, one method for all axes or a table pattern -> method; the first pattern that
        fits an axis decides. "block_influence" and "last" score only layers, the latter keeps the first ones;
        "activation" all but layers. "principal" cuts a width (`*/embed`) to the principal components of what blocks
        read, not to some of its channels.
      segments: parts that the way is divided into.
      mask_steps: steps over which gates close, per segment; 0 cuts at once.
      recover_steps: steps of distillation after each cut.
      frozen: path prefixes of parameters ("vision", "language") that are not trained. Image features that depend on
        nothing else, and on nothing that the stage cuts, are computed once, unless it weighs `vision`.
      repeat: question type -> how often an epoch sees its samples, the others' once: for what is learnt last.
      shift: pixels by which a picture is moved at random, at most, each way, whenever it is seen; what the teacher's
        cache says of it stays the same. Keeps a student from knowing few pictures by heart. Image features that are
        computed once are those of four moved views of each picture.
      weights: "kept": those that the units had; "random": new ones, the control from scratch; else the folder of a
        phase of `antgmm train`, `RUN/stages/NN-phase`: what it trained, laid over new ones.
      loss, optimizer: what differs from the recipe's own.
    """

    name: Name
    sizes: dict[Axis, Size] = {}
    importance: dict[str, Method] = Field(default={"*": "taylor"}, min_length=1)
    segments: Count = 1
    mask_steps: Annotated[int, Field(ge=0)] = 0
    recover_steps: Annotated[int, Field(ge=0)] = 0
    frozen: tuple[str, ...] = ()
    repeat: dict[str, Count] = {}
    shift: Annotated[int, Field(ge=0)] = 0
    weights: str = "kept"
    loss: Loss
    optimizer: Optimizer

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole stage."""
        return self.segments * (self.mask_steps + self.recover_steps)

    def method(self, axis: str) -> Method:
        """How the units of an axis are scored; also for an axis that is cut because it is tied to a stated one.

        Raises:
          AntgmmError: no pattern of `importance` fits the axis.
        """
        for pattern, method in self.importance.items():
            if fnmatch.fnmatchcase(axis, pattern):
                return method
        raise AntgmmError(f"stage {self.name!r} cuts {axis}, but no pattern of its importance fits it: add one")

    @property
    def keeps_moments(self) -> bool:
        """Whether the cut model's weights are some of those that it had, and so are the optimizer's moments."""
        return self.weights == "kept" and all(self.method(axis) != "principal" for axis in self.sizes)

    @field_validator("importance", mode="before")
    @classmethod
    def _for_all_axes(cls, value: Any) -> Any:
        return {"*": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _methods_fit(self) -> Self:
        used = set()
        for axis in self.sizes:
            pattern = next((p for p in self.importance if fnmatch.fnmatchcase(axis, p)), None)
            if pattern is None:
                raise ValueError(f"no pattern of importance fits {axis}")
            used.add(pattern)
            method, layers = self.importance[pattern], axis.endswith("/layers")
            unfit = (method in ("block_influence", "last") and not layers) or (method == "activation" and layers)
            if unfit or (method == "principal" and not axis.endswith("/embed")):
                raise ValueError(f"importance {method!r} cannot score {axis}")
        # "*" also decides for axes that are cut because they are tied to a stated one.
        idle = [pattern for pattern in self.importance if pattern not in used and pattern != "*"]
        if self.sizes and idle:
            raise ValueError(f"importance pattern {idle[0]!r} decides for none of {', '.join(self.sizes)}")
        if not self.sizes and ((self.segments, self.mask_steps) != (1, 0) or not self.recover_steps):
            raise ValueError("a stage without sizes only distils: segments = 1, mask_steps = 0, recover_steps from 1")
        if self.steps and self.optimizer.warmup >= self.steps:
            raise ValueError(f"warmup = {self.optimizer.warmup} is not below the stage's {self.steps} steps")
        if not self.keeps_moments and (self.segments, self.mask_steps) != (1, 0):
            how = 'importance "principal"' if self.weights == "kept" else f"weights = {self.weights!r}"
            raise ValueError(f"{how} leaves no units to close one by one: segments = 1, mask_steps = 0")
        return self


class Evaluate(Table):
    """What the scores in the report are measured on.

    Attributes:
      data: what differs from the recipe's own [data]; other records than those.
      max_new_tokens: longest answer.
    """

    data: Data
    max_new_tokens: Count = 32


class EvaluateTwice(Evaluate):
    """What a run is scored on, and harder records that only the teacher and the exported student are scored on.

    Attributes:
      data, max_new_tokens: as in `Evaluate`.
      hard: what differs from the recipe's own [data], such as `split = "test_hard"`; without the table there is no
        such score.
    """

    hard: MaadData | FileData | TfdsData | None = Field(default=None, discriminator="kind")


class Export(Table):
    """The Hugging Face folder that is written.

    Attributes:
      dtype: of its tensors.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class _Run(Table):
    data: Data
    optimizer: Optimizer
    evaluate: Evaluate
    export: Export = Export()
    seed: int = 0
    checkpoint_every: Count = 100
    buckets: tuple[Count, ...] = ()
    prompt_buckets: tuple[Count, ...] = ()
    pack: Annotated[int, Field(ge=0)] = 0
    max_length: Count = 512
    max_answer: Count = 64

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


class Recipe(_Run):
    """Cuts and distils a trained model, stage by stage.

    Attributes:
      teacher: the trained model.
      data: the records that importance and distillation see.
      loss: weights of the loss terms.
      optimizer: how a step is taken.
      stages: the cuts in order, `[[stage]]` in the file.
      evaluate: what the scores are measured on.
      export: form of the exported folder.
      seed: of the order of the data and of random importance.
      calibration_batches: batches that importance is averaged over.
      checkpoint_every: steps between two step checkpoints.
      buckets, prompt_buckets, pack, max_length, max_answer: as in `Training`; importance is averaged over rows of one
        sample and one width in any case.
      parent: folder of a finished stage of another run to start from, with its trained weights; "" starts from the
        teacher.
    """

    teacher: Teacher
    loss: Loss
    evaluate: EvaluateTwice
    stages: tuple[Stage, ...] = Field(alias="stage")
    calibration_batches: Count = 8
    parent: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_names("stage", [stage.name for stage in self.stages])
        comparing = [stage.name for stage in self.stages if stage.loss.hidden or stage.loss.vision]
        if comparing and not self.teacher.states:
            raise ValueError(f"stage {comparing[0]!r} compares block states: name the towers in teacher.states")
        if self.teacher.states and not comparing:
            raise ValueError("teacher.states is read by no stage: give loss.hidden or loss.vision a weight")
        moving = [stage.name for stage in self.stages if stage.shift and stage.loss.reads_teacher]
        if moving and self.teacher.mode == "online":
            raise ValueError(f"stage {moving[0]!r}: an online teacher would see the shifted pictures: give mode cache")
        return self


class Model(Table):
    """The model that is trained: from random parameters, or further from a checkpoint.

    Attributes:
      preset: name in `antgmm_jax.config.PRESETS`, for random parameters.
      sizes: axis -> units, laid over the preset's, smaller or larger; axes tied to a stated one follow it.
      path: a Hugging Face directory with its processor, instead of a preset: training starts from its parameters.
    """

    preset: str = ""
    sizes: dict[Axis, Count] = {}
    path: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.preset) == bool(self.path):
            raise ValueError("give preset for random parameters, or path for those of a checkpoint: one of the two")
        if self.path and self.sizes:
            raise ValueError("sizes are laid over a preset's; a checkpoint is cut by antgmm compress")
        return self


class Phase(Table):
    """One phase of a teacher's training.

    Attributes:
      name: names the phase's folder.
      kind: "facts" trains the image side on what MAAD-synth's pictures show, "answers" the model on its answers.
      steps: optimizer steps.
      frozen: path prefixes of parameters ("vision", "language/encoder") that an "answers" phase does not train.
      types: question types that an "answers" phase sees, all by default: for what is learnt last.
      optimizer: what differs from the recipe's own.
    """

    name: Name
    kind: Literal["facts", "answers"]
    steps: Count
    frozen: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    optimizer: Optimizer

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "facts" and self.frozen:
            raise ValueError("a facts phase trains the whole image side and nothing else; leave out frozen")
        if self.kind == "facts" and self.types:
            raise ValueError("a facts phase reads pictures, not questions; leave out types")
        if self.optimizer.warmup >= self.steps:
            raise ValueError(f"warmup = {self.optimizer.warmup} is not below the phase's {self.steps} steps")
        return self


class Training(_Run):
    """Trains a teacher phase by phase.

    Attributes:
      model: what is trained.
      data: the records it sees.
      optimizer: how a step is taken.
      phases: in order, `[[phase]]` in the file.
      evaluate: what the scores are measured on.
      export: form of the exported folder.
      seed: of the parameters and of the order of the data.
      checkpoint_every: steps between two step checkpoints.
      buckets: widths that a batch is cut to, the smallest first, as in [16, 32, 48]: answer tokens in a model with an
        encoder, all tokens of the row (the picture's too) in one without; longer rows keep the full width. A batch
        holds rows of one bucket, and each bucket compiles its own program. [] pads all rows alike.
      prompt_buckets: the same for the prompts (the picture's tokens too) that an encoder reads; each pair of buckets
        compiles its own program.
      pack: tokens of a row (the pictures' too) that several samples share, none seeing another; `batch_size` then
        counts such rows. For models without an encoder, in the place of buckets. 0 gives each sample its own row.
      max_length: most tokens of a prompt, the picture's not counted; a longer row is refused.
      max_answer: most tokens of an answer, the end token counted; a longer row is refused.
    """

    model: Model
    phases: tuple[Phase, ...] = Field(alias="phase")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_names("phase", [phase.name for phase in self.phases])
        facts = [phase.name for phase in self.phases if phase.kind == "facts"]
        if facts and self.data.kind != "maad":
            raise ValueError(
                f"phase {facts[0]!r} needs the facts of MAAD-synth, which data of kind {self.data.kind!r} lack"
            )
        return self


def _check_names(table: str, names: Sequence[str]) -> None:
    if not names:
        raise ValueError(f"there is no [[{table}]], nothing would be done")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two {table}s are named {name!r}")
