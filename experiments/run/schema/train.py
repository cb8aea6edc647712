"""Recipes that train a teacher: `antgmm train`."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from distill import LossConfig, StepConfig
from experiments.run.schema.stage import Objective, Stage, Work
from experiments.run.schema.tables import Axis, BaseRecipe, Count, Name, Table, check_names


class Model(Table):
    """The model to train, with random parameters or from a checkpoint.

    Attributes:
      preset: name in `antgmm_jax.presets.PRESETS`, for random parameters.
      sizes: axis -> units, instead of the preset's sizes; tied axes follow.
      path: Hugging Face directory (with processor) of the initial checkpoint, or hf:ORG/NAME on the Hub, instead of a
        preset.
    """

    preset: str = ""
    sizes: dict[Axis, Count] = Field(default={})
    path: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.preset) == bool(self.path):
            raise ValueError("set either preset (random parameters) or path (a checkpoint)")
        if self.path and self.sizes:
            raise ValueError("sizes are only for a preset; to change those of a checkpoint, use antgmm compress")
        return self


class Phase(Table):
    """A phase of a teacher's training.

    Attributes:
      name: name of the phase and its folder.
      kind: "facts" trains the image side on facts about images: MAAD-synth's, or the `latents` of your rows; "answers"
        the model on answers.
      steps: optimizer steps.
      frozen: path prefixes of parameters that an "answers" phase does not train, such as "language/encoder".
      adapters: path prefix of parameters ("language") -> rank of low-rank adapters (LoRA), which an "answers" phase
        trains instead of the parameters under it and adds to their linear maps at the end.
      optimizer: differences from the top-level [optimizer].
    """

    name: Name
    kind: Objective
    steps: Count
    frozen: tuple[str, ...] = ()
    adapters: dict[str, Count] = Field(default={})
    optimizer: StepConfig

    @property
    def stage(self) -> Stage:
        """The phase as a stage without pruning and teacher."""
        return Stage(
            name=self.name,
            recover_steps=self.steps,
            frozen=self.frozen,
            adapters=self.adapters,
            loss=LossConfig(),
            optimizer=self.optimizer,
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "facts" and (self.frozen or self.adapters):
            raise ValueError("a facts phase trains exactly the image side; remove frozen and adapters")
        if self.kind == "facts" and self.optimizer.accumulate > 1:
            raise ValueError("a facts phase does not support accumulate; remove it, or reduce batch_size")
        if self.optimizer.warmup >= self.steps:
            raise ValueError(f"warmup = {self.optimizer.warmup} is not less than the phase's {self.steps} steps")
        return self


class Training(BaseRecipe):
    """Trains a teacher, phase by phase.

    Attributes:
      model: the model to train.
      phases: the phases, in order.
    """

    model: Model
    phases: tuple[Phase, ...] = Field(alias="phase")
    # Only recipes that prune a trained model have these.
    teacher: ClassVar[None] = None
    calibration_batches: ClassVar[int] = 0

    @property
    def work(self) -> tuple[Work, ...]:
        """The phases in the common form of both kinds of recipes; the report scores what the last one has trained."""
        last = len(self.phases)
        return tuple(
            Work(
                number,
                f"phase {phase.name!r}",
                phase.stage,
                phase.kind,
                self.seed + number,
                scored=phase.kind == "answers" and number < last,
            )
            for number, phase in enumerate(self.phases, 1)
        )

    def until(self, number: int) -> Self:
        """Returns the recipe with its first phases only, without further checks."""
        return self.model_copy(update={"phases": self.phases[:number]})

    @property
    def answers(self) -> bool:
        """Whether the trained model answers questions: its last phase trains answers."""
        return self.phases[-1].kind == "answers"

    @property
    def start(self) -> str:
        """Path of the initial checkpoint; "" for random parameters."""
        return self.model.path

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_names("phase", [phase.name for phase in self.phases])
        return self
