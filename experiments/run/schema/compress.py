"""Recipes that cut and distil a trained model: `antgmm compress`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distill import LossConfig
from experiments.run.schema.stage import Stage, Work
from experiments.run.schema.tables import (
    BaseRecipe,
    Count,
    Evaluate,
    FileData,
    MaadData,
    Name,
    Table,
    TfdsData,
    check_names,
)


class Teacher(Table):
    """The trained model: what is cut, and what the student learns from.

    Attributes:
      path: its Hugging Face folder.
      mode: "cache" computes its final hidden states at answer positions once; "online" runs it at every step.
      states: towers whose block states are compared, "vision" and "bridge" by the `vision` loss, "encoder", "decoder"
        (LLaVA: "text") by `hidden`; cached too under "cache". Exactly the recipes with such a loss name some.
      pairs: further records to train on, pictures of the samples with other samples' questions, which the teacher
        answers once; 0 for none.
    """

    path: str
    mode: Literal["cache", "online"] = "cache"
    states: tuple[Name, ...] = ()
    pairs: Annotated[int, Field(ge=0)] = 0


class EvaluateTwice(Evaluate):
    """What a run is scored on, and harder records that only the teacher and the exported student are scored on.

    Attributes:
      data, max_new_tokens: as in `Evaluate`.
      hard: what differs from the recipe's own [data], such as `split = "test_hard"`; without the table there is no
        such score.
    """

    hard: MaadData | FileData | TfdsData | None = Field(default=None, discriminator="kind")


class Recipe(BaseRecipe):
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
      buckets, prompt_buckets, pack, prompt, max_length, max_answer: as in `Training`; importance is averaged over rows
        of one sample and one width in any case.
      parent: folder of a finished stage of another run to start from, with its trained weights; "" starts from the
        teacher.
    """

    teacher: Teacher
    loss: LossConfig
    evaluate: EvaluateTwice
    stages: tuple[Stage, ...] = Field(alias="stage")
    calibration_batches: Count = 8
    parent: str = ""

    @property
    def work(self) -> tuple[Work, ...]:
        """The stages as the run machine takes them."""
        return tuple(
            Work(number, f"stage {stage.name!r}", stage, "answers", self.seed + 1000 * number)
            for number, stage in enumerate(self.stages, 1)
        )

    @property
    def hard(self) -> MaadData | FileData | TfdsData | None:
        """Harder records that are scored as well, if any."""
        return self.evaluate.hard

    @property
    def start(self) -> str:
        """The checkpoint that the run starts from."""
        return self.teacher.path

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_names("stage", [stage.name for stage in self.stages])
        comparing = [stage.name for stage in self.stages if stage.loss.hidden or stage.loss.vision]
        if comparing and not self.teacher.states:
            raise ValueError(f"stage {comparing[0]!r} compares block states: name the towers in teacher.states")
        if self.teacher.states and not comparing:
            raise ValueError("teacher.states is read by no stage: give loss.hidden or loss.vision a weight")
        moving = [stage.name for stage in self.stages if stage.shift and stage.loss.reads_teacher]
        if moving and self.teacher.mode == "online":
            raise ValueError(f"stage {moving[0]!r}: an online teacher would see the shifted pictures: give mode cache")
        return self
