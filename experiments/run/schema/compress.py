"""Recipes that prune and distil a trained model: `antgmm compress`."""

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
    """The trained model, which is pruned and which the student learns from.

    Attributes:
      path: its Hugging Face folder, or hf:ORG/NAME or hf:ORG/NAME@REVISION on the Hub.
      mode: "cache" computes its final hidden states at answer positions once; "online" runs it at every step, in the
        dtype of the top-level [optimizer].
      states: towers with block states to compare: "vision" and "bridge" for the `vision` loss, "encoder" and "decoder"
        (decoder-only: "text") for the `hidden` loss. Required with such a loss only; also cached with "cache".
      top: with mode "cache", number of the teacher's most probable tokens to store for each answer token instead of its
        final hidden state; other tokens count as one class. 0 stores the state, which gives the logits of all tokens.
      pairs: number of additional training records: images of samples with questions of other samples, answered by the
        teacher; 0 for none.
    """

    path: str
    mode: Literal["cache", "online"] = "cache"
    states: tuple[Name, ...] = ()
    top: Annotated[int, Field(ge=0)] = 0
    pairs: Annotated[int, Field(ge=0)] = 0


class EvaluateTwice(Evaluate):
    """Evaluation of a run, and optionally of hard records for the teacher and the exported student.

    Attributes:
      hard: differences from the top-level [data], such as `split = "test_hard"`; without this table there is no such
        evaluation.
    """

    hard: MaadData | FileData | TfdsData | None = Field(default=None, discriminator="kind")


class Report(Table):
    """The report of a run.

    Attributes:
      latency: whether to time requests to teacher, stages and student, and measure their energy.
    """

    latency: bool = True


class Recipe(BaseRecipe):
    """Prunes and distils a trained model, stage by stage.

    Attributes:
      teacher: the trained model.
      loss: weights of the loss terms; stages override them.
      stages: the stages, in order.
      calibration_batches: number of batches for importance scores; always with one sample per row, without
        buckets.
      parent: folder of a finished stage of another run to start from; "" for the teacher.
      report: what the report measures.
    """

    teacher: Teacher
    loss: LossConfig
    evaluate: EvaluateTwice
    stages: tuple[Stage, ...] = Field(alias="stage")
    calibration_batches: Count = 8
    parent: str = ""
    report: Report = Report()

    @property
    def work(self) -> tuple[Work, ...]:
        """The stages in the common form of both kinds of recipes."""
        return tuple(
            Work(number, f"stage {stage.name!r}", stage, "answers", self.seed + 1000 * number)
            for number, stage in enumerate(self.stages, 1)
        )

    def until(self, number: int) -> Self:
        """Returns the recipe with its first stages only, without further checks."""
        return self.model_copy(update={"stages": self.stages[:number]})

    @property
    def hard(self) -> MaadData | FileData | TfdsData | None:
        """Hard test records, if any."""
        return self.evaluate.hard

    @property
    def start(self) -> str:
        """Path of the initial checkpoint."""
        return self.teacher.path

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_names("stage", [stage.name for stage in self.stages])
        comparing = [stage.name for stage in self.stages if stage.loss.hidden or stage.loss.vision]
        if comparing and not self.teacher.states:
            raise ValueError(f"stage {comparing[0]!r} compares block states: list the towers in teacher.states")
        if self.teacher.states and not comparing:
            raise ValueError("no stage uses teacher.states: set the weight of loss.hidden or loss.vision")
        moving = [stage.name for stage in self.stages if stage.shift and stage.loss.reads_teacher]
        if moving and self.teacher.mode == "online":
            raise ValueError(
                f"stage {moving[0]!r}: an online teacher would read the shifted images: set teacher.mode to cache"
            )
        self._check_top()
        return self

    def _check_top(self) -> None:
        """Raises ValueError if `teacher.top` does not fit the losses."""
        if not (top := self.teacher.top):
            return
        if self.teacher.mode != "cache":
            raise ValueError(f"teacher.top = {top} is for a cache: set teacher.mode to cache")
        losses = [stage.loss for stage in self.stages if stage.loss.reads_logits]
        if not losses:
            raise ValueError(f"teacher.top = {top} has no effect: set the weight of loss.soft or loss.rank")
        if any(loss.rank for loss in losses) and top < 4:
            raise ValueError(f"teacher.top = {top}: loss.rank reads the teacher's four most probable tokens")
        if len(temperatures := {f"{loss.temperature:g}" for loss in losses}) > 1:
            raise ValueError(f"teacher.top = {top} needs one loss.temperature, not {', '.join(sorted(temperatures))}")
