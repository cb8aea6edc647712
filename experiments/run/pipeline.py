"""A run: initial model, stages, export and scores; an interrupted run can be resumed."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import ProcessorMixin

from antgmm_jax.axes import sizes, to_dict
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint
from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.processes import broadcast_from_first, run_on_first
from antgmm_jax.pure import Params, abstract
from data.packing import check_lengths
from data.source import Source
from distill import NO_TEACHER, Diverged
from experiments.run.checks import check_batches, check_steps
from experiments.run.cuts import after, stored_features
from experiments.run.export import exporting
from experiments.run.features import ImageFeatures, check_space
from experiments.run.folder import RunFolder
from experiments.run.host.allocator import return_freed_memory, returning_memory_of_compilers
from experiments.run.host.console import say
from experiments.run.host.energy import Energy
from experiments.run.micro_batches import with_parts
from experiments.run.objectives import Shared
from experiments.run.progress.forecast import TARGETS, Rows, announce, look_at
from experiments.run.progress.watching import NOTHING, Watch, watching
from experiments.run.remedies import in_another_run
from experiments.run.repeating import with_visits
from experiments.run.rows.datasets import check_apart, encode_both, encoded, encoder_of, load_both, load_records
from experiments.run.rows.pairs import with_pairs
from experiments.run.rows.samples import Samples
from experiments.run.schema import Recipe, Training, Work
from experiments.run.scores.scoring import scored, teacher_scored
from experiments.run.stage import Left, StageRun
from experiments.run.start import decided_by, opening
from experiments.run.student import Student, completed, load_after
from experiments.run.targets import bridge_weights_of, targets_of
from pruning.costs import total_parameters


class Outcome(NamedTuple):
    """Result of a run, for its report.

    Attributes:
        folder: folder of the run, locked by this process.
        recipe: recipe of the run.
        teacher: the model that was pruned; None if a model was trained without a teacher.
        student: the final model, opened from the exported files.
        test: test records.
        hard: hard test records, or None.
        processor: processor of both models.
        teacher_scored: returns the result of `scored` for the teacher on the test records, from a file if it exists.
    """

    folder: RunFolder
    recipe: Recipe | Training
    teacher: Student | None
    student: Student
    test: Samples
    hard: Samples | None
    processor: ProcessorMixin
    teacher_scored: Callable[[], tuple[dict[str, Any], list[str]]]


class Run:
    """A run, on the current mesh if there is one, in one or several processes.

    Args:
        recipe: the recipe.
        path: folder of the run.
        cache: folder of teacher caches that several runs share; by default inside the folder of the run.
        watch: what to report about its steps.
        alike: folder of a run with the same teacher and records; other ones are an error.
    """

    def __init__(
        self,
        recipe: Recipe | Training,
        path: str | Path,
        *,
        cache: Path | None = None,
        watch: Watch = NOTHING,
        alike: Path | None = None,
    ):
        self.recipe, self.folder, self._watch = recipe, RunFolder(path), watch
        self._alike = alike and RunFolder(alike)
        self._cache = cache or self.folder.cache

    @contextmanager
    def exported(self) -> Iterator[Outcome]:
        """Starts or resumes stages and export; the folder is locked inside the context.

        Yields:
            The result of the run, for its report.

        Raises:
            AntgmmError: invalid input, or the export gate failed.
        """
        with self._opened() as student:
            exported = exporting.exported(self.recipe, self.folder, self.origin, student, self.test)
            models = self.origin.teacher, exported
            records = self.test, self.hard
            yield Outcome(self.folder, self.recipe, *models, *records, self.origin.processor, self.teacher_scored)

    def finish_stages(self) -> Student:
        """Starts or resumes the stages, without export and report.

        Returns:
            The model after the last stage.

        Raises:
            AntgmmError: invalid input.
        """
        with self._opened() as student:
            return student

    def scores(self) -> dict[str, Any]:
        """Starts or resumes the stages and evaluates the final model, without export and report.

        The recipe is one of a compression: the report of a training has its scores.

        Returns:
            `params`, `sizes`, `seconds`, `exact_match`, `by_type`, and `exact_match_hard` if there are hard records.

        Raises:
            AntgmmError: invalid input.
        """
        with self._opened() as student:
            last = self.recipe.work[-1]
            metrics = checkpoint.load_record(self.folder.stage(last.number, last.stage.name))["metrics"]
            scores = {name: metrics["scores"][name] for name in ("exact_match", "by_type")}
            if self.hard is not None:
                title, config = "scores on hard records", student.config
                scores["exact_match_hard"] = self._scores(title, config, student.weights(), self.hard)["exact_match"]
            size = total_parameters(student.config)
            return {"params": size, "sizes": sizes(student.config), "seconds": self.folder.status.seconds, **scores}

    @contextmanager
    def _opened(self) -> Iterator[Student]:
        """Locks the folder and runs all stages; yields the final model."""
        recipe = self.recipe = self.folder.pinned(self.recipe)
        self.folder.check(recipe)
        # Without the lock, nothing is removed yet.
        for work in self._without(lambda number, name: checkpoint.is_complete(self.folder.stage(number, name))):
            check_batches(work)
        begin = opening(recipe)
        # Lock the folder only after checking that the recipe can run.
        with returning_memory_of_compilers(), self.folder.opened(recipe):
            records = load_both(recipe)
            student, self.origin = begin(records[0])
            self._remaining = self._unfinished()
            devices = sharding.devices()  # the first process alone has no mesh
            forecast = run_on_first(lambda: self._announce(records, student.config, devices))
            samples = self._encoded(records, student.config)
            # Logs are opened before the teacher's targets, which may take hours: a login may be missing.
            with watching(self._watch, self.folder.path, recipe, forecast) as self._watcher:
                shared = self._shared(samples)
                for work in recipe.work:
                    student = self._stage(work, student, shared)
                shared.features.drop(strict=False)  # no stage reads them again
            del samples, shared  # a cache of the teacher may be in memory
            yield student

    def _announce(self, records: tuple[Source, Source], config: LMMConfig, devices: int) -> dict[str, float]:
        """Prints the remaining parts of the run, and returns their estimated durations."""
        recipe = self.recipe
        encoder = encoder_of(recipe, self.origin.processor, config)
        hard = recipe.hard.samples if recipe.hard else 0
        if not (looks := look_at(records[0], encoder)):
            return {}
        done = [work.title for work in recipe.work if work not in self._remaining]
        if not any(work.stage.loss.reads_teacher for work in self._remaining):
            done.append(TARGETS)
        teacher = None if self.origin.teacher is None else self.origin.teacher.config
        rows = Rows(len(records[0]), len(records[1]), hard, **looks)
        return announce(recipe, config, rows, done, teacher=teacher, devices=devices)

    def _encoded(self, records: tuple[Source, Source], start: LMMConfig) -> Samples:
        """Encodes the records, checks the stages, and binds the folder to its inputs; returns the training records."""
        recipe, (teacher, processor, *_) = self.recipe, self.origin
        config = start if teacher is None else teacher.config
        samples, self.test = encode_both(recipe, records, processor, config)
        samples.check_types({work.title: (*work.stage.visits,) for work in recipe.work})
        if recipe.pack:
            check_lengths(samples.needs.text, recipe.pack)
        # The teacher's answers to further questions are not there yet; few of them are unfit.
        pairs, needed = (recipe.teacher.pairs if isinstance(recipe, Recipe) else 0), 0
        for work in recipe.work:
            if work in self._remaining:
                check_steps(work, abstract(start), samples.rows_to_train(work) + pairs)
            if recipe.features == "disk" and work.objective == "answers":
                needed = max(needed, stored_features(start, work.stage, samples) * (1 + pairs / len(samples)))
            start = after(start, work.stage)
        run_on_first(lambda: self._check_disk(round(needed)))
        # Before training, so that invalid records are reported now.
        self.hard = None
        if recipe.hard is not None:
            hard = load_records(recipe.hard)
            self.hard = encoded(recipe, hard, processor, config)
            check_apart(records[0], hard)
            self.test.pad_prompts_like(self.hard)
        for tested in filter(None, (self.test, self.hard)):
            tested.check_room(recipe.evaluate.max_new_tokens)
        inputs = {
            "model" if teacher is None else "teacher": self.origin.key,
            "data": samples.fingerprint,
            "test_rows": self.test.fingerprint,
            "hard_rows": self.hard.fingerprint if self.hard else "",
        }
        if self._alike is not None:
            self._alike.bind(**inputs)
        self.folder.bind(**inputs, **decided_by(recipe))
        # Now: the stages of other runs may be removed once they are read.
        self._identities = [_identity(inputs | decided_by(recipe.until(work.number))) for work in recipe.work]
        return samples

    def _check_disk(self, needed: int) -> None:
        """Checks the space for image features before the first stage, not after it."""
        if len(self._remaining) == len(self.recipe.work):
            check_space(self.folder.cache / "features", needed)

    def _shared(self, samples: Samples) -> Shared:
        """Prepares the teacher's targets."""
        recipe, (teacher, processor, *_) = self.recipe, self.origin
        place, remaining = self.folder.cache / "features", self._remaining
        if teacher is None or not isinstance(recipe, Recipe) or not remaining:
            features = ImageFeatures(samples, recipe.seed, place)
            return Shared(recipe, NO_TEACHER, dict, samples, features, lambda stage: None)
        if recipe.teacher.pairs:
            with self.folder.status.metered("pairs"):
                samples = with_pairs(recipe, samples, teacher.config, teacher.weights(), processor, self._cache)
        reads = any(work.stage.loss.reads_teacher for work in remaining)  # finished stages need no targets
        source, frozen = (
            targets_of(recipe, teacher, self.origin.key, samples, self.folder, self._cache)
            if reads
            else (NO_TEACHER, dict)
        )
        return_freed_memory()
        features = ImageFeatures(samples, recipe.seed, place)
        return Shared(
            recipe, source, frozen, samples, features, lambda stage: bridge_weights_of(recipe, stage, teacher, samples)
        )

    def _unfinished(self) -> list[Work]:
        """The stages that are not finished; removes the step checkpoints of the others."""
        return self._without(self.folder.finished)

    def _without(self, finished: Callable[[int, str], bool]) -> list[Work]:
        """The stages for which `finished` (number, name) is false, as the first process sees the folder."""
        work = self.recipe.work
        seen = run_on_first(lambda: [finished(each.number, each.stage.name) for each in work])
        done = broadcast_from_first(np.array(seen or [False] * len(work)))
        return [each for each, complete in zip(work, done, strict=True) if not complete]

    def _stage(self, work: Work, student: Student, shared: Shared) -> Student:
        done = self.folder.stage(work.number, work.stage.name)
        if work not in self._remaining:
            record = checkpoint.load_record(done)
            if record.get("identity") != self._identities[work.number - 1]:
                raise AntgmmError(f"{done} is a stage of another run: remove it and start again")
            say(f"{work.title}: complete in {done}")
            return load_after(done, record, student)
        with self.folder.status.metered(done.name) as energy:
            after = self._trained(work, student, shared, energy)
        return_freed_memory()
        return after

    def _trained(self, work: Work, student: Student, shared: Shared, energy: Callable[[], Energy]) -> Student:
        run_on_first(lambda: exporting.forget(self.folder))
        working = self.folder.steps(work.number, work.stage.name)
        work = with_parts(work)
        work = with_visits(work, self._parent(work), lambda: self.teacher_scored()[0], shared.samples.rows.index.names)
        watcher = self._watcher.stage(work, None if self.origin.teacher is None else self.origin.teacher.config)
        try:
            result = StageRun(work, shared, working, watcher, self._identities[work.number - 1]).run(student)
        except Diverged as error:
            raise Diverged(f"{error} {in_another_run(self.recipe, self.folder, work.number)}") from error
        return_freed_memory()
        metrics: dict[str, Any] = {"history": result.history}
        if work.scored:
            params = completed(result.params, student)
            scores = metrics["scores"] = self._scores(f"scores after {work.title}", result.config, params, self.test)
            say(f"{work.title}: exact match {scores['exact_match']:.3f}, token loss {scores['token_loss']:.3f}")
        metrics["energy"] = energy()._asdict()
        record = self._record(work, result, shared) | {"metrics": metrics}
        done = self.folder.stage(work.number, work.stage.name)
        checkpoint.save_stage(done, {"params": result.params}, record)
        checkpoint.discard_steps(working)
        return load_after(done, checkpoint.load_record(done), student)

    def _record(self, work: Work, result: Left, shared: Shared) -> dict[str, Any]:
        """Record of a stage without metrics; with its kept units if there is a teacher."""
        record = {
            "stage": work.stage.model_dump(mode="json"),
            "objective": work.objective,
            "identity": self._identities[work.number - 1],
            "config": to_dict(result.config),
            "seed": self.recipe.seed,
            "data": shared.samples.fingerprint,
            "position": result.position,
        }
        if self.origin.teacher is None:
            return record
        parent = self._parent(work)
        return record | {"parent": str(parent or ""), "teacher": self.origin.key, "keep": result.keep}

    def _parent(self, work: Work) -> Path | None:
        """Folder of the stage that a stage starts from; None for the initial checkpoint or new parameters."""
        if work.number > 1:
            return self.folder.stage(work.number - 1, self.recipe.work[work.number - 2].stage.name)
        return Path(self.origin.parent) if self.origin.parent else None

    def teacher_scored(self) -> tuple[dict[str, Any], list[str]]:
        """Returns scores and answers of the teacher on the test records, measured once, after the run was opened."""
        assert isinstance(self.recipe, Recipe)
        return teacher_scored(self._cache, self.recipe, self.origin, self.test)

    def _scores(self, title: str, config: LMMConfig, params: Params, records: Samples) -> dict[str, Any]:
        longest, dtype = self.recipe.evaluate.max_new_tokens, self.recipe.optimizer.dtype
        processor = self.origin.processor
        return scored(title, config, params, records, processor, max_new_tokens=longest, dtype=dtype)[0]


def _identity(decided: Mapping[str, str]) -> str:
    """Digest of everything that decides a stage, without later stages; equal ones of two runs are exchangeable."""
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]
