"""The schema of a stage: pruning, training and losses."""

import fnmatch
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from antgmm_jax.errors import AntgmmError
from distill import LossConfig, StepConfig
from experiments.run.schema.tables import LARGEST, Axis, Count, Name, Size, Table

Objective = Literal["answers", "facts"]
"""Training objective: answers (of the data or a teacher), or facts about images."""

Method = Literal["taylor", "magnitude", "activation", "block_influence", "random", "last", "principal"]

UNREAD = {"magnitude", "random", "last"}
"""Methods that read no data."""
IMPORTANCE: dict[str, Method] = {"*/layers": "block_influence", "*": "activation"}
"""ShortGPT's block influence (arXiv 2403.03853), and activation norms similar to Minitron's (arXiv 2407.14679; see
`pruning.activation`); it loses least on pretrained models."""


Repeat = Annotated[
    Annotated[dict[str, Count], Tag("table")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(lambda value: "auto" if isinstance(value, str) else "table"),
]


def can_score(method: Method, axis: str) -> bool:
    """Whether an importance method supports an axis: some are for layers only, one for other axes, one for widths."""
    if method in ("block_influence", "last"):
        return axis.endswith("/layers")
    if method == "principal":
        return axis.endswith("/embed")
    return method != "activation" or not axis.endswith("/layers")


class Stage(Table):
    """Pruning to given sizes, followed by distillation.

    A stage reaches its sizes in `segments` equal parts. In each part, gates close over `mask_steps` steps, the closed
    units are removed, and the smaller model is distilled for `recover_steps` steps.

    Attributes:
      name: name of the stage and its folder.
      sizes: axis -> units to keep, or (with a decimal point) the fraction to keep; without sizes, the stage only
        distils.
      importance: importance method for all axes, or a table pattern -> method, of which the first matching pattern
        applies. "block_influence" and "last" (keeps the first layers) are only for layers; "activation" is not for
        layers. "principal" prunes a width (`*/embed`) to principal components instead of channels.
      segments: number of parts of the pruning.
      mask_steps: steps per segment over which gates close; 0 prunes at once.
      recover_steps: steps of distillation per segment, after pruning.
      frozen: path prefixes of parameters that are not trained, such as "vision" or "language". If the stage neither
        trains nor prunes the image side, nor has the `vision` loss, image features are computed only once.
      adapters: path prefix of parameters ("language") -> rank of low-rank adapters (LoRA), which are trained instead of
        the parameters under it and added to their linear maps at the end; the optimizer stores moments of the adapters
        only. Not with sizes.
      repeat: question type -> number of visits of its samples per epoch (1 for other types), for types that are learnt
        slowly; or "auto" for numbers from 1 to 4 that follow the gaps between the scores of the model before the stage
        and those of the teacher.
      shift: maximum random shift of images in pixels, in each direction, on every visit; the teacher's cached states
        are those of the original images. It reduces overfitting to few images. With image features that are computed
        only once, each image has four shifted views.
      weights: initial weights: "kept" for those of the kept units, "random" for new ones (a baseline trained from
        scratch), or the folder of a phase of `antgmm train` (`RUN/stages/NN-phase`) that provides trained parameters.
      loss, optimizer: differences from the top-level tables.
    """

    name: Name
    sizes: dict[Axis, Size] = Field(default={})
    importance: dict[str, Method] = Field(default=IMPORTANCE, min_length=1)
    segments: Count = 1
    mask_steps: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    recover_steps: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    frozen: tuple[str, ...] = ()
    adapters: dict[str, Count] = Field(default={})
    repeat: Repeat = Field(default={})
    shift: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    weights: str = "kept"
    loss: LossConfig
    optimizer: StepConfig

    @property
    def steps(self) -> int:
        """Total number of optimizer steps."""
        return self.segments * (self.mask_steps + self.recover_steps)

    def method(self, axis: str) -> Method:
        """Returns the importance method of an axis, which may also be one that is tied to an axis of `sizes`.

        Raises:
          AntgmmError: no pattern of `importance` matches the axis.
        """
        for pattern, method in self.importance.items():
            if fnmatch.fnmatchcase(axis, pattern):
                return method
        raise AntgmmError(f"stage {self.name!r} prunes {axis}, but no pattern of its importance matches it: add one")

    @property
    def constant(self) -> tuple[str, ...]:
        """Path prefixes of parameters that training does not change; the maps among them may have adapters."""
        return (*self.frozen, *self.adapters)

    @property
    def cuts(self) -> bool:
        """Whether the stage changes the model before training."""
        return bool(self.sizes) or self.weights != "kept"

    @property
    def visits(self) -> dict[str, int]:
        """The numbers of `repeat`; empty while they are not known."""
        return {} if self.repeat == "auto" else self.repeat

    @property
    def keeps_moments(self) -> bool:
        """Whether pruning can close units gradually and keep the optimizer's moments."""
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
                raise ValueError(f"no pattern of importance matches {axis}")
            used.add(pattern)
            if not can_score(self.importance[pattern], axis):
                raise ValueError(f"importance {self.importance[pattern]!r} cannot score {axis}")
        # "*" also applies to axes that are tied to those of `sizes`, the default to all models.
        idle = [pattern for pattern in self.importance if pattern not in used and pattern != "*"]
        if self.sizes and idle and self.importance != IMPORTANCE:
            raise ValueError(f"importance pattern {idle[0]!r} matches none of {', '.join(self.sizes)}")
        if not self.sizes and ((self.segments, self.mask_steps) != (1, 0) or not self.recover_steps):
            raise ValueError("a stage without sizes needs segments = 1, mask_steps = 0 and recover_steps of at least 1")
        if self.cuts and self.adapters:
            raise ValueError("adapters need a stage without sizes: add one after this stage")
        if inside := [(part, whole) for part in self.frozen for whole in self.adapters if part.startswith(f"{whole}/")]:
            part, whole = inside[0]
            raise ValueError(
                f"adapters of {whole} would train {part}, which is frozen: name the other parts of {whole}"
            )
        if self.steps and self.optimizer.warmup >= self.steps:
            raise ValueError(f"warmup = {self.optimizer.warmup} is not less than the stage's {self.steps} steps")
        if not self.keeps_moments and (self.segments, self.mask_steps) != (1, 0):
            how = 'importance "principal"' if self.weights == "kept" else f"weights = {self.weights!r}"
            raise ValueError(f"{how} cannot close units gradually: set segments = 1, mask_steps = 0")
        return self


class Work(NamedTuple):
    """A stage of either kind of recipe.

    Attributes:
        number: position in the run, from 1.
        title: name in messages, such as "stage 'blocks'".
        stage: settings of the stage.
        objective: training objective.
        seed: seed of the order of its data and of new parameters.
        scored: whether the model answers the test records after it.
    """

    number: int
    title: str
    stage: Stage
    objective: Objective
    seed: int
    scored: bool = True

    @property
    def constant(self) -> tuple[str, ...]:
        """Path prefixes of the model's parameters that training does not change; facts are of the image side alone."""
        return (*self.stage.constant, *(["language"] if self.objective == "facts" else []))

    @property
    def narrow(self) -> tuple[str, ...]:
        """Path prefixes of parameters that keep the two bytes of their files while the stage trains."""
        # A step in float32 would need a copy in float32 of them all; new weights are float32.
        return self.constant if self.stage.optimizer.dtype != "float32" and self.stage.weights == "kept" else ()
