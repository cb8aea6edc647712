"""Recipes that train a teacher: `antgmm train`."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from distill import LossConfig, StepConfig
from experiments.run.schema.stage import Objective, Stage, Work
from experiments.run.schema.tables import Axis, BaseRecipe, Count, Name, Table, check_names


class Model(Table):
    """The model that is trained: from random parameters, or further from a checkpoint.

    Attributes:
      preset: name in `antgmm_jax.presets.PRESETS`, for random parameters.
      sizes: axis -> units, laid over the preset's, smaller or larger; axes tied to a stated one follow it.
      path: a Hugging Face directory with its processor, instead of a preset: training starts from its parameters.
    """

    preset: str = ""
    sizes: dict[Axis, Count] = Field(default={})
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
      optimizer: what differs from the recipe's own.
    """

    name: Name
    kind: Objective
    steps: Count
    frozen: tuple[str, ...] = ()
    optimizer: StepConfig

    @property
    def stage(self) -> Stage:
        """The same as a stage that cuts nothing and has no teacher."""
        return Stage(
            name=self.name, recover_steps=self.steps, frozen=self.frozen, loss=LossConfig(), optimizer=self.optimizer
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "facts" and self.frozen:
            raise ValueError("a facts phase trains the whole image side and nothing else; leave out frozen")
        if self.kind == "facts" and self.optimizer.accumulate > 1:
            raise ValueError("a facts phase takes its batch whole; leave out accumulate, or lower batch_size")
        if self.optimizer.warmup >= self.steps:
            raise ValueError(f"warmup = {self.optimizer.warmup} is not below the phase's {self.steps} steps")
        return self


class Training(BaseRecipe):
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
      prompt: how the model is asked: `{question}` and `{text}` stand for a record's, square brackets around `{text}`
        hold what is left out of records without one. A LLaVA's chat template is laid around it. "" asks as the
        checkpoint that is started from was (`antgmm.json` in its folder), or "[text: {text} ]question: {question}".
      max_length: most tokens of a prompt, the picture's not counted; a longer row is refused.
      max_answer: most tokens of an answer, the end token counted; a longer row is refused.
    """

    model: Model
    phases: tuple[Phase, ...] = Field(alias="phase")
    # What only a recipe that cuts a trained model has.
    teacher: ClassVar[None] = None
    calibration_batches: ClassVar[int] = 0

    @property
    def work(self) -> tuple[Work, ...]:
        """The phases as the run machine takes them."""
        return tuple(
            Work(number, f"phase {phase.name!r}", phase.stage, phase.kind, self.seed + number)
            for number, phase in enumerate(self.phases, 1)
        )

    @property
    def start(self) -> str:
        """The checkpoint that the run starts from; "" for random parameters."""
        return self.model.path

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_names("phase", [phase.name for phase in self.phases])
        facts = [phase.name for phase in self.phases if phase.kind == "facts"]
        if facts and self.data.kind != "maad":
            raise ValueError(
                f"phase {facts[0]!r} needs the facts of MAAD-synth, which data of kind {self.data.kind!r} lack"
            )
        return self
