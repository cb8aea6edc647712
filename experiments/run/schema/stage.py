"""A stage of a run: what is cut, what is trained and on which losses; what the run machine takes of it."""

import fnmatch
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from antgmm_jax.errors import AntgmmError
from distill import LossConfig, StepConfig
from experiments.run.schema.tables import Axis, Count, Name, Size, Table

Objective = Literal["answers", "facts"]
"""What a stage is trained on: answers, of the data or of a teacher, or what MAAD-synth's pictures show."""

Method = Literal["taylor", "magnitude", "activation", "block_influence", "random", "last", "principal"]


def can_score(method: Method, axis: str) -> bool:
    """Whether a method of importance can score an axis: some are for layers alone, one for all else, one for widths."""
    if method in ("block_influence", "last"):
        return axis.endswith("/layers")
    if method == "principal":
        return axis.endswith("/embed")
    return method != "activation" or not axis.endswith("/layers")


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
    sizes: dict[Axis, Size] = Field(default={})
    importance: dict[str, Method] = Field(default={"*": "taylor"}, min_length=1)
    segments: Count = 1
    mask_steps: Annotated[int, Field(ge=0)] = 0
    recover_steps: Annotated[int, Field(ge=0)] = 0
    frozen: tuple[str, ...] = ()
    repeat: dict[str, Count] = Field(default={})
    shift: Annotated[int, Field(ge=0)] = 0
    weights: str = "kept"
    loss: LossConfig
    optimizer: StepConfig

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
    def cuts(self) -> bool:
        """Whether it changes the model before it trains it."""
        return bool(self.sizes) or self.weights != "kept"

    @property
    def keeps_moments(self) -> bool:
        """Whether cuts of the stated sizes leave units to close, and moments to go on with."""
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
            if not can_score(self.importance[pattern], axis):
                raise ValueError(f"importance {self.importance[pattern]!r} cannot score {axis}")
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


class Work(NamedTuple):
    """A stage as the run machine takes it, whichever kind of recipe names it.

    Attributes:
        number: its place in the run, from 1.
        title: names it in errors and on the console: "stage 'blocks'".
        stage: what is cut and how it is trained.
        objective: what it is trained on.
        seed: of the order of its data and of its new parameters.
    """

    number: int
    title: str
    stage: Stage
    objective: Objective
    seed: int
