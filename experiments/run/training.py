"""Trains a teacher phase by phase and exports it as a Hugging Face directory; resumes at any step."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import ProcessorMixin

import distill
from antgmm_jax import checkpoint
from antgmm_jax.config import LMMConfig, QFormerConfig, resize, to_dict
from antgmm_jax.convert import load_hf, open_hf
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete, violations
from antgmm_jax.functional import Params, abstract, float32, functional
from antgmm_jax.presets import preset
from antgmm_jax.processes import by_first
from antgmm_jax.sharding import own_rows
from data.batches import Batches, batches
from data.maad.cells import cell_classes
from data.maad.source import latent_sizes
from data.maad.tier import tier
from data.processor import blip2_processor, device_batch, llava_processor
from data.record import PROMPT, Record, prompt
from data.tokenizer import IMAGE, corpus, train_tokenizer
from experiments.run.checks import check_steps
from experiments.run.datasets import encode_both, load_both
from experiments.run.evaluate import evaluate
from experiments.run.features import ImageFeatures, freezes_features
from experiments.run.folder import WHOLE, RunFolder, write_json
from experiments.run.host.console import bar, say
from experiments.run.host.energy import Energy
from experiments.run.pretrain import IMAGE_SIDE, init_params, make_pretrain_step
from experiments.run.prompts import prompt_of
from experiments.run.publish import publish
from experiments.run.samples import load_processor
from experiments.run.schema import Data, MaadData, Model, Phase, Training
from experiments.run.stage import optimizer_of
from experiments.run.stepper import HISTORY_EVERY, Stepper, add_point


def shape_of(recipe: Training) -> LMMConfig:
    """The model that a recipe trains: its checkpoint's, or its preset with the recipe's sizes laid over it.

    Args:
        recipe: the recipe.

    Returns:
        The config; of a preset's, the tokenizer will yet decide the vocabulary.

    Raises:
        AntgmmError: no such preset or checkpoint, sizes that no model of its family has, or a phase that it cannot
            take.
    """
    model = recipe.model
    config = open_hf(model.path)[0] if model.path else _preset_of(model)
    facts = [phase.name for phase in recipe.phases if phase.kind == "facts"]
    if facts and not isinstance(config.bridge, QFormerConfig):
        raise AntgmmError(
            f"phase {facts[0]!r} trains a Q-Former, which {model.path or model.preset} lacks: "
            "give it phases of kind answers"
        )
    return config


def _preset_of(model: Model) -> LMMConfig:
    base = preset(model.preset)
    try:
        config = resize(base, complete(base, model.sizes))
    except AntgmmError as error:
        raise AntgmmError(f"model.sizes: {error}") from None
    if broken := violations(config):
        raise AntgmmError(f"model.sizes: transformers cannot serve this shape: {'; '.join(broken)}")
    return config


def make_processor(config: LMMConfig, data: Data, records: Sequence[Record], template: str = PROMPT) -> ProcessorMixin:
    """The processor of a model that is trained from scratch, with a tokenizer of its data.

    Args:
        config: the model.
        data: where the records come from.
        records: what it is trained on.
        template: of the prompts.

    Returns:
        A processor of the model's family, with at most the config's number of tokens.
    """
    vocab, px = config.language.vocab, config.vision.image
    if data.kind == "maad":
        tokenizer = train_tokenizer(corpus(data.tier, seed=data.seed, template=template), vocab=vocab)
    else:
        # A user's few rows repeat little: what occurs twice is worth a token.
        texts = (text for r in records for text in (prompt(r.question, r.text, template), r.answer))
        tokenizer = train_tokenizer(texts, vocab=vocab, min_frequency=2)
    if isinstance(config.bridge, QFormerConfig):
        return blip2_processor(tokenizer, px=px, queries=config.bridge.queries)
    return llava_processor(tokenizer, px=px, patch=config.vision.patch)


class TrainingRun:
    """One run of `antgmm train`, on the ambient mesh if there is one, in one process or several.

    Args:
        recipe: what to do.
        path: the run's folder.
    """

    def __init__(self, recipe: Training, path: str | Path):
        self.recipe, self.folder = recipe, RunFolder(path)

    def __call__(self) -> dict[str, Any]:
        """Trains, or goes on training, and exports.

        Returns:
            Scores, size, seconds and energy.

        Raises:
            AntgmmError: bad input, or a loss that is not finite.
        """
        for phase in self.recipe.phases:
            own_rows(phase.optimizer.batch_size)  # refuses what the mesh does not divide
        self.folder.check(self.recipe)
        shape = shape_of(self.recipe)
        # A recipe that cannot run must not claim the folder.
        with self.folder.opened(self.recipe):
            return self._run(shape)

    def _run(self, shape: LMMConfig) -> dict[str, Any]:
        recipe = self.recipe
        records = load_both(recipe)
        params = self._start(shape, records[0])
        self.samples, self.test = encode_both(recipe, records, self.processor, self.config)
        self.samples.check_types({f"phase {phase.name!r}": phase.types for phase in recipe.phases})
        whole = abstract(self.config)
        for phase in recipe.phases:
            paths, rows = whole, 0 if recipe.pack else len(self.samples.rows_of(phase.types))
            if phase.kind == "facts":
                paths, rows = {part: whole[part] for part in IMAGE_SIDE}, len(self.samples)
            check_steps(f"phase {phase.name!r}", phase.optimizer, paths, rows, phase.frozen)
        self.folder.bind(data=self.samples.fingerprint)
        self.features = ImageFeatures(self.samples, recipe.seed)
        for number, phase in enumerate(recipe.phases, 1):
            params = self._phase(number, phase, params)
        return self._export(params)

    def _start(self, shape: LMMConfig, records: Sequence[Record]) -> Params:
        """The parameters to begin with; sets the config and the processor that go with them."""
        recipe = self.recipe
        if recipe.model.path:
            self.processor = load_processor(recipe.model.path)
            self.config, params = load_hf(recipe.model.path)
            return float32(self.config, params)
        self.processor = make_processor(shape, recipe.data, records, prompt_of(recipe))
        vocab = -(-len(self.processor.tokenizer) // 64) * 64
        language = dataclasses.replace(shape.language, vocab=vocab)
        self.config = dataclasses.replace(shape, language=language, image_token=IMAGE)
        return functional(self.config).init(jax.random.key(recipe.seed))

    def _phase(self, number: int, phase: Phase, params: Params) -> Params:
        done = self.folder.stage(number, phase.name)
        if self.folder.finished(number, phase.name):
            say(f"phase {phase.name}: found complete in {done}")
            return float32(self.config, {**params, **checkpoint.load_stage(done)[0]["params"]})
        with self.folder.metered(done.name) as energy:
            return self._learn(number, phase, params, energy)

    def _learn(self, number: int, phase: Phase, params: Params, energy: Callable[[], Energy]) -> Params:
        done, working = self.folder.stage(number, phase.name), self.folder.steps(number, phase.name)
        root = "model/" if phase.kind == "facts" else ""
        optimizer = optimizer_of(phase.optimizer, phase.steps, phase.frozen, root=root)
        prepare = self._facts if phase.kind == "facts" else self._answers
        trained, step, data = prepare(number, phase, params, optimizer)
        state, history = self._train(phase, Stepper(working, data), step, distill.init_state(trained, optimizer), data)
        new = state.params["model"] if phase.kind == "facts" else state.params
        record = {
            "phase": phase.model_dump(mode="json"),
            "config": to_dict(self.config),
            "metrics": {"history": history, "energy": energy()._asdict()},
            "seed": self.recipe.seed,
            "data": self.samples.fingerprint,
        }
        checkpoint.save_stage(done, {"params": new}, record)
        checkpoint.discard_steps(working)
        return {**params, **new}

    def _facts(self, number: int, phase: Phase, params: Params, optimizer: distill.Optimizer):
        """What is trained on the pictures' facts, how a step is taken, and its batches."""
        assert isinstance(self.recipe.data, MaadData)  # the schema says so
        self.features.drop()
        seed, records = self.recipe.seed + number, self.samples.records
        facts, classes = latent_sizes(self.recipe.data.tier), cell_classes(tier(self.recipe.data.tier))
        trained = init_params(self.config, params, facts, classes, jax.random.key(seed))
        dtype, remat = jax.numpy.dtype(phase.optimizer.dtype), phase.optimizer.remat
        step = make_pretrain_step(self.config, params, facts, optimizer, dtype=dtype, remat=remat)
        cells = np.stack([r.cells for r in records if r.cells is not None])
        arrays = {"images": self.samples.arrays["images"], "cells": cells}
        arrays |= {f"fact/{n}": np.array([r.latents[n] for r in records], np.int32) for n in facts}
        finish = partial(device_batch, self.samples.table)
        return trained, step, batches(arrays, size=phase.optimizer.batch_size, seed=seed, finish=finish)

    def _answers(self, number: int, phase: Phase, params: Params, optimizer: distill.Optimizer):
        """What is trained on answers, how a step is taken, and its batches."""
        loss = distill.LossConfig(hard=1.0)
        table, dtype = phase.optimizer, jax.numpy.dtype(phase.optimizer.dtype)
        pure = functional(self.config, table.remat)
        step = distill.make_step(pure, optimizer, loss, micro_batches=table.accumulate, dtype=dtype)
        size, seed = phase.optimizer.batch_size, self.recipe.seed + number
        features = None
        if freezes_features(self.config, phase.frozen):
            features = self.features(self.config, params)
        else:
            self.features.drop()
        rows = self.samples.rows_of(phase.types)
        return params, step, self.samples.shuffled(size, seed, features=features, rows=rows)

    def _train(self, phase: Phase, stepper: Stepper, step, state: distill.State, data: Batches):
        history: list[dict[str, float]] = []
        if found := stepper.record():
            state, history = stepper.restore(state), found["history"]
        with bar(f"phase {phase.name}", phase.steps) as update:

            def report(progress: distill.Progress) -> None:
                add_point(history, progress)
                update(progress.step, f"loss {progress.metrics['loss']:.4f}")

            try:
                state, _ = distill.train(
                    step,
                    state,
                    data,
                    steps=phase.steps,
                    save=lambda state: stepper.save(state, {"history": history}),
                    save_every=self.recipe.checkpoint_every,
                    last_checkpoint=stepper.last,
                    report=report,
                    report_every=HISTORY_EVERY,
                )
            finally:
                stepper.finish()
        return state, history

    def _export(self, params: Params) -> dict[str, Any]:
        directory, like = self.folder.export, Path(self.recipe.model.path or self.folder.path / "processor")
        if not self.recipe.model.path:
            by_first(lambda: save_processor(self.processor, like))
        publish(self.config, params, directory, like, dtype=self.recipe.export.dtype, prompt=prompt_of(self.recipe))
        config, params = load_hf(directory)
        with bar("scores", len(self.test)) as update:
            scores, _ = evaluate(
                config,
                params,
                self.test,
                self.processor,
                max_new_tokens=self.recipe.evaluate.max_new_tokens,
                progress=update,
            )
        place = self.folder.report / "report.json"

        def tell() -> None:  # the first process alone counts energy
            size = sum(leaf.size for leaf in jax.tree.leaves(params))
            report = {"params": size, "scores": scores, "seed": self.recipe.seed}
            energy = self.folder.energy[WHOLE]._asdict()
            write_json(place, {**report, "wall_seconds": self.folder.seconds, "energy": energy})

        by_first(tell)
        return json.loads(place.read_text())


def save_processor(processor: ProcessorMixin, directory: Path) -> None:
    """A processor's files, and a config.json that tells `transformers` the special tokens of its tokenizer.

    Args:
        processor: the processor.
        directory: where to; what `save_hf` takes as `like`.
    """
    processor.save_pretrained(directory)
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    found = {name: getattr(processor.tokenizer, name) for name in names}
    tokens = {name: token for name, token in found.items() if token is not None}
    write_json(directory / "config.json", {"text_config": tokens})
