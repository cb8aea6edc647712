"""One stage: the way from a model to a smaller, distilled one, resumable at any step."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import pruning
from antgmm_jax import checkpoint
from antgmm_jax.axes import sizes, to_dict
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete, from_dict
from antgmm_jax.functional import Params, float32, functional
from data.batches import Batches
from data.record import Arrays
from distill import (
    LossConfig,
    Optimizer,
    Progress,
    State,
    Teacher,
    init_state,
    lay_out,
    make_optimizer,
    make_step,
    map_moments,
    parts,
    train,
)
from distill.optimizer import under
from experiments.run.features import ImageFeatures, freezes_features
from experiments.run.host.console import bar
from experiments.run.importance import importance
from experiments.run.samples import Samples
from experiments.run.schema import Loss, Stage
from experiments.run.schema import Optimizer as OptimizerTable
from experiments.run.stepper import HISTORY_EVERY, Stepper, add_point


class Student(NamedTuple):
    """A model on its way: config, parameters (float32) and where its units lie in the teacher."""

    config: LMMConfig
    params: Params
    keep: dict[str, np.ndarray]


class _Place(NamedTuple):
    """Where a running stage stands, beside its arrays.

    Attributes:
        config: the model as it is now.
        keep: its units in the teacher.
        cuts: segments whose cut is done.
        plan: what the segment at hand closes and cuts, in the model's coordinates; empty outside a mask phase.
        scores: of the units that the plan cuts.
        history: points of the loss curves so far.
    """

    config: LMMConfig
    keep: dict[str, np.ndarray]
    cuts: int
    plan: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    history: list[dict[str, float]]


def optimizer_of(table: OptimizerTable, steps: int, frozen: tuple[str, ...] = (), *, root: str = "") -> Optimizer:
    """The optimizer that a recipe's table describes, its schedule running once over `steps`.

    Args:
        table: of a stage or phase; rates of what it freezes are left out.
        steps: its steps.
        frozen: path prefixes of parameters that it does not train.
        root: what stands before the model's own paths in those of the parameters that are trained.
    """
    rates = {root + path: rate for path, rate in table.rates.items() if not any(under(path, one) for one in frozen)}
    return make_optimizer(
        kind=table.kind,
        learning_rate=table.learning_rate,
        steps=max(steps, 1),
        schedule=table.schedule,
        warmup=table.warmup,
        floor=table.floor,
        weight_decay=table.weight_decay,
        clip=table.clip,
        b2=table.b2,
        rates=rates,
        frozen=frozen,
    )


def loss_config(table: Loss) -> LossConfig:
    """The loss weights that a recipe's table gives."""
    return LossConfig(**table.model_dump(exclude={"bridge_tokens"}))


class StageRun:
    """Runs one stage of a recipe.

    Args:
        stage: the stage of the recipe.
        number: its place, for the seed of its data order.
        teacher: where targets come from.
        towers: whose block states the hidden and vision losses compare.
        samples: the records that it sees.
        features: their image features.
        seed: the recipe's.
        calibration_batches: batches that importance is averaged over.
        working: folder of the step checkpoints.
        checkpoint_every: steps between two of them.
        bridge_weights: of the tokens that the bridge hands on, as `distill.parts` takes them.
    """

    def __init__(
        self,
        stage: Stage,
        number: int,
        teacher: Teacher,
        towers: tuple[str, ...],
        samples: Samples,
        features: ImageFeatures,
        *,
        seed: int,
        calibration_batches: int,
        working: Path,
        checkpoint_every: int,
        bridge_weights: np.ndarray | None = None,
    ):
        self.stage, self.teacher, self.towers = stage, teacher, towers
        self.samples, self.features = samples, features
        self.seed, self.calibration_batches, self.checkpoint_every = (
            seed + 1000 * number,
            calibration_batches,
            checkpoint_every,
        )
        self.optimizer = optimizer_of(stage.optimizer, stage.steps, stage.frozen)
        self.working, self.bridge_weights = working, bridge_weights

    def run(self, start: Student) -> tuple[Student, list[dict[str, float]]]:
        """From the model that the stage finds to the one it leaves.

        Args:
            start: what the stage before left.

        Returns:
            The student, and the points of its loss curves.
        """
        steps = self.stage.mask_steps + self.stage.recover_steps
        targets = segment_targets(start.config, self.stage)
        self.data = self._shuffled(start, targets[-1])
        self.stepper = Stepper(self.working, self.data)
        state, place = self._resume(start)
        with bar(f"stage {self.stage.name}", self.stage.steps) as self.progress:
            for segment in range(self.stage.segments):
                begin = segment * steps
                if place.cuts == segment:
                    if not place.plan:
                        place = self._plan(state.params, place, targets[segment])
                    state, place = self._mask(state, place, begin)
                    state, place = self._cut(state, place)
                if int(state.step) < begin + steps:
                    state = self._train(state, place, lambda step: {}, begin + steps)
        return Student(place.config, state.params, place.keep), place.history

    def _plan(self, params: Params, place: _Place, targets: Mapping[str, int]) -> _Place:
        full = complete(place.config, targets)
        scores, bases = importance(
            place.config,
            params,
            {axis: self.stage.method(axis) for axis in full},
            full,
            self.samples,
            **self.stage.optimizer.pieces(self.calibration_batches),
            seed=self.seed,
        )
        keep = {**pruning.plan(scores, place.config, targets), **bases}
        return place._replace(plan=keep, scores={axis: scores[axis] for axis in keep if axis in scores})

    def _mask(self, state: State, place: _Place, begin: int) -> tuple[State, _Place]:
        length = self.stage.mask_steps
        if length == 0 or int(state.step) >= begin + length:
            return state, place

        def gates(step: int):
            return pruning.gates_at(place.plan, place.scores, place.config, (step - begin + 1) / length)

        return self._train(state, place, gates, begin + length), place

    def _cut(self, state: State, place: _Place) -> tuple[State, _Place]:
        config, params = pruning.shrink(place.config, state.params, place.plan)
        if self.stage.weights != "kept":
            params = new_weights(config, self.stage.weights, self.seed)
        if self.stage.weights == "kept" and not any(map(pruning.is_basis, place.plan.values())):
            axes, keep = functional(place.config).axes, pruning.array_keep(place.config, place.plan)
            moments = map_moments(
                state.opt_state, state.params, self.optimizer, lambda tree: pruning.take(tree, axes, keep)
            )
        else:
            moments = init_state(params, self.optimizer).opt_state
        cut = place._replace(
            config=config, keep=pruning.compose(place.keep, place.plan), cuts=place.cuts + 1, plan={}, scores={}
        )
        return State(params, moments, state.step), cut

    def _train(self, state: State, place: _Place, gates: Callable[[int], Any], until: int) -> State:
        compared = parts(place.config, place.keep, bridge_weights=self.bridge_weights)
        step = make_step(
            functional(place.config, self.stage.optimizer.remat),
            self.optimizer,
            loss_config(self.stage.loss),
            teacher=self.teacher,
            parts=tuple(part for part in compared if part.term == "bridge" or part.tower in self.towers),
            micro_batches=self.stage.optimizer.accumulate,
            dtype=jax.numpy.dtype(self.stage.optimizer.dtype),
        )
        try:
            state, _ = train(
                step,
                state,
                self._batches(),
                steps=until,
                gates_at=gates,
                teacher=self.teacher,
                save=lambda state: self._save(state, place),
                save_every=self.checkpoint_every,
                last_checkpoint=self.stepper.last,
                report=lambda progress: self._report(progress, place),
                report_every=HISTORY_EVERY,
                names=self.samples.names,
            )
        finally:
            self.stepper.finish()
        return state

    def _shuffled(self, start: Student, targets: Mapping[str, int]) -> Batches:
        """What is trained on: image features in the place of pictures where the stage leaves them as they are."""
        features = None
        if reads_features(start.config, self.stage, targets):
            features = self.features(start.config, start.params, self.stage.shift)
        else:
            self.features.drop()
        loss = self.stage.loss
        return self.samples.shuffled(
            self.stage.optimizer.batch_size,
            self.seed,
            # What reads no answer compiles one program for all lengths.
            full=not (loss.reads_answers or self.samples.pack),
            features=features,
            pictures=self.teacher.reads_pictures and loss.reads_teacher,
            rows=self.samples.repeated(self.stage.repeat),
            shift=self.stage.shift,
        )

    def _batches(self) -> Iterator[Arrays]:
        """What the steps are taken on."""
        return self.data

    def _report(self, progress: Progress, place: _Place) -> None:
        add_point(place.history, progress)
        self.progress(progress.step, f"loss {progress.metrics['loss']:.4f}")

    def _save(self, state: State, place: _Place) -> str:
        record = {
            "config": to_dict(place.config),
            "keep": place.keep,
            "cuts": place.cuts,
            "plan": place.plan,
            "scores": place.scores,
            "history": place.history,
        }
        return self.stepper.save(state, record)

    def _resume(self, start: Student) -> tuple[State, _Place]:
        record = self.stepper.record()
        if record is None:
            return init_state(start.params, self.optimizer), _Place(start.config, start.keep, 0, {}, {}, [])
        config = from_dict(record["config"])
        pure = functional(config)
        like = jax.eval_shape(lambda: init_state(pure.init(jax.random.key(0)), self.optimizer))
        # Under another mesh than the one that saved it, the state is read onto the devices of this one.
        state = self.stepper.restore(lay_out(like, pure.axes, self.optimizer))
        arrays = {
            name: {axis: pruning.as_kept(v) for axis, v in record[name].items()} for name in ("keep", "plan", "scores")
        }
        return state, _Place(config, cuts=record["cuts"], history=record["history"], **arrays)


def new_weights(config: LMMConfig, source: str, seed: int) -> Params:
    """Parameters of a cut model that keeps none of the teacher's: what a control starts from.

    Args:
        config: the cut model.
        source: "random", or the folder of a finished phase of `antgmm train`, laid over random ones.
        seed: of the random ones.

    Returns:
        float32 parameters.

    Raises:
        AntgmmError: no such phase, or one of another shape.
    """
    params = functional(config).init(jax.random.key(seed))
    trained = {} if source == "random" else checkpoint.load_stage(source)[0]["params"]
    laid = {**params, **trained}
    if jax.tree.map(np.shape, laid) != jax.tree.map(np.shape, params):
        raise AntgmmError(f"{source} trained another shape than this cut: give its recipe the same model.sizes")
    return float32(config, laid)


def reads_features(config: LMMConfig, stage: Stage, targets: Mapping[str, int]) -> bool:
    """Whether a stage trains on image features that are computed once: nothing that they depend on moves.

    Args:
        config: the model that the stage finds.
        stage: the stage.
        targets: axis -> size that it cuts to.

    Returns:
        Whether it runs no image side.
    """
    cut = any(axis.startswith(("vision/", "bridge/")) for axis in complete(config, targets))
    return freezes_features(config, stage.frozen) and not (cut or stage.loss.vision)


def segment_targets(config: LMMConfig, stage: Stage) -> list[dict[str, int]]:
    """The sizes that each segment of a stage ends at: equal parts of the way, each the next legal size above.

    Args:
        config: the model that the stage finds.
        stage: its sizes and segments.

    Returns:
        One {axis: size} a segment; the last is the stage's own.

    Raises:
        AntgmmError: an illegal size, naming the nearest legal ones, or one that would grow an axis.
    """
    present = sizes(config)
    final = pruning.resolve(config, stage.sizes)
    found = []
    for segment in range(1, stage.segments):
        part = {
            axis: present[axis] + round((n - present[axis]) * segment / stage.segments) for axis, n in final.items()
        }
        found.append(pruning.legal_above(config, part))
    return [*found, final]
