"""A stage: prunes and trains a model; it can be resumed at any step."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import pruning
from antgmm_jax.axes import to_dict
from antgmm_jax.config import LMMConfig
from antgmm_jax.families import complete, from_dict
from antgmm_jax.parallel import preemption
from antgmm_jax.parallel.processes import broadcast_from_first
from antgmm_jax.pure import Params, functional
from distill import Optimizer, Progress, State, init_state, make_optimizer, map_moments, train
from distill.adapters import ADAPTERS
from distill.trainable import by_path, trainable, under
from experiments.run.calibration import importance, importance_pieces
from experiments.run.cuts import new_weights, segment_targets
from experiments.run.host.allocator import return_freed_memory
from experiments.run.host.console import bar
from experiments.run.objectives import OBJECTIVES, Shared
from experiments.run.progress.watching import StageWatcher
from experiments.run.schema import Stage, Work
from experiments.run.stepper import HISTORY_EVERY, Stepper, add_point
from experiments.run.student import Student
from experiments.run.unchanged import Unchanged
from pruning.keep import shrunk_config


class _Place(NamedTuple):
    """Progress of a running stage, without its arrays.

    Attributes:
        config: current model config.
        keep: kept units of the teacher.
        cuts: number of segments that are pruned already.
        plan: units that the current segment keeps, as indices of the current model; empty unless gates are closing.
        scores: scores of the axes in `plan`.
        history: points of the loss curves.
    """

    config: LMMConfig
    keep: dict[str, np.ndarray]
    cuts: int
    plan: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    history: list[dict[str, float]]


def optimizer_of(stage: Stage, params: Params, root: str = "") -> Optimizer:
    """Creates the optimizer of a stage.

    Rates of parameters that the stage does not train are left out; those of maps with adapters apply to the adapters.

    Args:
        stage: the stage.
        params: parameters of its state, with adapters, or their shapes.
        root: prefix of the model's parameter paths in `params`.

    Returns:
        The optimizer, with a schedule over the steps of the stage.
    """
    table = stage.optimizer
    trained, _ = by_path(trainable(params, stage.constant))
    rates = {top + path: rate for path, rate in table.rates.items() for top in (root, f"{ADAPTERS}/")}
    used = {prefix: rate for prefix, rate in rates.items() if any(under(path, prefix) for path in trained)}
    return make_optimizer(dataclasses.replace(table, rates=used), stage.steps, stage.constant)


class Left(NamedTuple):
    """Result of a stage.

    Attributes:
        config: model config.
        params: trained parameters, possibly only those under some top-level names.
        keep: kept units of the teacher.
        history: points of the loss curves.
        position: position in the data.
    """

    config: LMMConfig
    params: Params
    keep: dict[str, np.ndarray]
    history: list[dict[str, float]]
    position: dict[str, int]


class StageRun:
    """Runs a stage.

    Args:
        work: the stage.
        shared: objects that all stages share.
        working: folder of its step checkpoints.
        watcher: reports its steps.
        identity: digest of everything that decides it; its steps are bound to it.
    """

    def __init__(self, work: Work, shared: Shared, working: Path, watcher: StageWatcher, identity: str = ""):
        self.work, self.stage, self.shared, self.working, self.watcher = work, work.stage, shared, working, watcher
        self.identity = identity

    def run(self, start: Student) -> Left:
        """Starts or resumes the stage; its last step is saved too, for what comes before the stage is complete.

        Args:
            start: model before the stage.

        Returns:
            The result of the stage.

        Raises:
            Preempted: SIGTERM was received; the last step is saved.
        """
        stage, steps = self.stage, self.stage.mask_steps + self.stage.recover_steps
        self.start = start
        targets = segment_targets(start.config, stage)
        self.objective = OBJECTIVES[self.work.objective](self.work, self.shared, start)
        self.optimizer = optimizer_of(stage, self.objective.shapes(), self.objective.root)
        self.data = self.objective.data
        self.stepper = Stepper(self.working, self.data, self.identity)
        self.unchanged = Unchanged(self.work, start, self.objective.root)
        state, place = self._resume(start)
        done = 0 if state is None else int(state.step)
        with bar(self.work.title, stage.steps, done, safe_point=_no_safe_point) as self.progress:
            for segment in range(stage.segments):
                begin = segment * steps
                if stage.cuts and place.cuts == segment:
                    if not place.plan:
                        place = self._plan(state, place, targets[segment])
                    state, place = self._mask(state, place, begin)
                    state, place = self._cut(state, place)
                state = self._started(state)
                if int(state.step) < begin + steps:
                    state = self._train(state, place, lambda step: {}, begin + steps)
        state = self._started(state)
        self._keep(state, place)
        return Left(place.config, self.objective.learnt(state.params), place.keep, place.history, self.data.position)

    def _started(self, state: State | None) -> State:
        """The state, created if no step has been taken. Before the first cut, it would be larger than necessary."""
        return state or init_state(self.objective.begin(), self.optimizer, own=True)

    def _plan(self, state: State | None, place: _Place, targets: Mapping[str, int]) -> _Place:
        full, table = complete(place.config, targets), self.stage.optimizer
        self.progress(place.cuts * (self.stage.steps // self.stage.segments), "importance")
        methods = {axis: self.stage.method(axis) for axis in full}
        try:
            scores, bases = importance(
                place.config,
                self.start.load(table.dtype) if state is None else state.params,
                methods,
                full,
                self.shared.samples,
                **importance_pieces(
                    table, place.config, self.shared.recipe.calibration_batches, methods, **self.shared.samples.lengths
                ),
                dtype=table.dtype,
                remat=table.remat,
                seed=self.work.seed,
            )
        except preemption.Preempted:
            self._keep(state, place)
            raise
        return_freed_memory()
        # Rounding may differ between machines, and all must cut the same units.
        scores, bases = broadcast_from_first((scores, bases))
        keep = pruning.plan(scores, place.config, targets)
        pruning.check_scores(scores, {axis: keep[axis] for axis in targets})
        keep |= bases
        return place._replace(plan=keep, scores={axis: scores[axis] for axis in keep if axis in scores})

    def _mask(self, state: State | None, place: _Place, begin: int) -> tuple[State | None, _Place]:
        length = self.stage.mask_steps
        if length == 0 or (state is not None and int(state.step) >= begin + length):
            return state, place

        def gates(step: int):
            return pruning.gates_at(place.plan, place.scores, place.config, (step - begin + 1) / length)

        return self._train(self._started(state), place, gates, begin + length), place

    def _cut(self, state: State | None, place: _Place) -> tuple[State, _Place]:
        config, params = self._pruned(state, place)
        cut = place._replace(
            config=config, keep=pruning.compose(place.keep, place.plan), cuts=place.cuts + 1, plan={}, scores={}
        )
        if state is None:
            return init_state(params, self.optimizer, own=True), cut
        # Units, no basis: components are cut before the first step (`check_sizes`).
        axes, keep = functional(place.config).axes, pruning.array_keep(place.config, place.plan)
        moments = map_moments(
            state.opt_state, state.params, self.optimizer, lambda tree: pruning.take(tree, axes, keep)
        )
        return State(params, moments, state.step), cut

    def _pruned(self, state: State | None, place: _Place) -> tuple[LMMConfig, Params]:
        """Config and parameters after the cut; before the first step, read from disk."""
        if self.stage.weights != "kept":
            config = shrunk_config(place.config, place.plan)
            return config, new_weights(config, self.stage.weights, self.work.seed)
        if state is None:
            return self.start.cut(place.plan, self.work.narrow)
        return pruning.shrink(place.config, state.params, place.plan)

    @cached_property
    def _frozen(self) -> Params:
        """Parameters of the teacher; they are freed with the stage."""
        return self.objective.frozen()

    def _train(self, state: State, place: _Place, gates: Callable[[int], Any], until: int) -> State:
        step = self.objective.step(place.config, place.keep, self.optimizer)
        try:
            state, _ = train(
                self.watcher.step(step, int(state.step)),
                state,
                self.watcher.batches(self.data),
                steps=until,
                gates_at=gates,
                teacher=self.objective.teacher._replace(params=self._frozen),
                save=lambda state: self._save(state, place),
                save_every=self.shared.recipe.checkpoint_every,
                last_checkpoint=self.stepper.last,
                report=lambda progress: self._report(progress, place),
                report_every=HISTORY_EVERY,
                names=self.shared.samples.names,
            )
        finally:
            self.stepper.finish()
        return state

    def _report(self, progress: Progress, place: _Place) -> None:
        add_point(place.history, progress)
        self.progress(progress.step, f"loss {progress.metrics['loss']:.4f}")
        self.watcher.report(progress, place.config)

    def _keep(self, state: State | None, place: _Place) -> None:
        """Saves the last step, unless it is saved already or there is none."""
        if state is not None and int(state.step):
            self._save(state, place)
            self.stepper.finish()

    def _save(self, state: State, place: _Place) -> str:
        record: dict[str, Any] = {"history": place.history}
        if self.stage.cuts:
            record |= {
                "config": to_dict(place.config),
                "keep": place.keep,
                "cuts": place.cuts,
                "plan": place.plan,
                "scores": place.scores,
            }
        return self.stepper.save(self.unchanged.without(state), record)

    def _resume(self, start: Student) -> tuple[State | None, _Place]:
        place, record = _Place(start.config, start.keep, 0, {}, {}, []), self.stepper.record()
        if record is None:
            return None, place
        place = place._replace(history=record["history"])
        if self.stage.cuts:
            names = ("keep", "plan", "scores")
            arrays = {name: {axis: pruning.as_kept(v) for axis, v in record[name].items()} for name in names}
            place = place._replace(config=from_dict(record["config"]), cuts=record["cuts"], **arrays)
        like = self.objective.like(place.config, self.optimizer)
        return self.unchanged.restored(self.stepper.restore, like), place


def _no_safe_point() -> None:
    """Progress of training is no safe point: the loop saves before it ends."""
