"""Trains a teacher phase by phase and exports it as a Hugging Face directory; resumes at any step."""

import dataclasses
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import ProcessorMixin

import distill
from antgmm_jax import checkpoint
from antgmm_jax.config import LMMConfig, preset, to_dict
from antgmm_jax.convert import load_hf, save_hf
from antgmm_jax.functional import Params, functional
from data.batches import batches
from data.maad.source import latent_sizes
from data.processor import blip2_processor, device_batch
from data.record import prompt
from data.tokenizer import IMAGE, corpus, train_tokenizer
from experiments.console import bar, say
from experiments.datasets import Samples, load_records
from experiments.evaluate import evaluate
from experiments.folder import RunFolder, write_json
from experiments.pretrain import init_params, make_pretrain_step
from experiments.schema import MaadData, Phase, Training
from experiments.stage import optimizer_of


class TrainingRun:
    """One run of `antgmm train`.

    Args:
        recipe: what to do.
        path: the run's folder.
    """

    def __init__(self, recipe: Training, path: str | Path):
        self.recipe, self.folder = recipe, RunFolder(path)
        self.began = time.time()

    def __call__(self) -> dict[str, Any]:
        """Trains, or goes on training, and exports.

        Returns:
            Scores, seconds and sizes.

        Raises:
            AntgmmError: bad input, or a loss that is not finite.
        """
        with self.folder.opened(self.recipe):
            recipe = self.recipe
            records, test = load_records(recipe.data), load_records(recipe.evaluate.data)
            self.processor = self._processor(records)
            base = preset(recipe.model.preset)
            vocab = -(-len(self.processor.tokenizer) // 64) * 64
            language = dataclasses.replace(base.language, vocab=vocab)
            self.config = dataclasses.replace(base, language=language, image_token=IMAGE)
            say(f"reading {recipe.data.samples} samples")
            self.samples = Samples(records, self.processor, self.config)
            self.test = Samples(test, self.processor, self.config)
            params = functional(self.config).init(jax.random.key(recipe.seed))
            for number, phase in enumerate(recipe.phases, 1):
                params = self._phase(number, phase, params)
            return self._export(params)

    def _processor(self, records) -> ProcessorMixin:
        data, base = self.recipe.data, preset(self.recipe.model.preset)
        if data.kind == "maad":
            tokenizer = train_tokenizer(corpus(data.tier, seed=data.seed), vocab=base.language.vocab)
        else:
            # A user's few rows repeat little: what occurs twice is worth a token.
            texts = (text for r in records for text in (prompt(r.question, r.text), r.answer))
            tokenizer = train_tokenizer(texts, vocab=base.language.vocab, min_frequency=2)
        return blip2_processor(tokenizer, px=base.vision.image, queries=base.qformer.queries)

    def _phase(self, number: int, phase: Phase, params: Params) -> Params:
        done, working = self.folder.stage(number, phase.name), self.folder.steps(number, phase.name)
        if checkpoint.is_complete(done):
            say(f"phase {phase.name}: found complete in {done}")
            return {**params, **checkpoint.load_stage(done)[0]["params"]}
        began = time.time()
        optimizer = optimizer_of(phase.optimizer, phase.steps, phase.frozen)
        if phase.kind == "facts":
            assert isinstance(self.recipe.data, MaadData)  # the schema says so
            facts = latent_sizes(self.recipe.data.tier)
            trained = init_params(self.config, params, facts, jax.random.key(self.recipe.seed + number))
            step = make_pretrain_step(self.config, params, facts, optimizer)
            arrays = {"images": self.samples.arrays["images"]}
            latents = [record.latents for record in self.samples.records]
            arrays |= {f"fact/{n}": np.array([row[n] for row in latents], np.int32) for n in facts}
        else:
            trained, arrays = params, self.samples.arrays
            step = distill.make_step(
                functional(self.config),
                optimizer,
                distill.LossConfig(hard=1.0),
                micro_batches=phase.optimizer.accumulate,
            )
        state, history = self._train(phase, working, step, distill.init_state(trained, optimizer), arrays, number)
        new = state.params["model"] if phase.kind == "facts" else state.params
        record = {
            "phase": phase.model_dump(mode="json"),
            "config": to_dict(self.config),
            "metrics": {"history": history, "seconds": time.time() - began},
            "seed": self.recipe.seed,
            "data": self.samples.fingerprint,
        }
        checkpoint.save_stage(done, {"params": new}, record)
        checkpoint.discard_steps(working)
        return {**params, **new}

    def _train(self, phase: Phase, working: Path, step, state, arrays, number: int):
        recipe, history = self.recipe, []
        data = batches(
            arrays,
            size=phase.optimizer.batch_size,
            seed=recipe.seed + number,
            finish=partial(device_batch, self.samples.table),
        )
        at, last = checkpoint.latest_step(working), ""
        if at is not None:
            like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
            state, record = checkpoint.load_step(working, at, like)
            data.seek(record["position"])
            history, last = record["history"], str(working / f"{at:08d}")

        def save(state) -> str:
            record = {"position": data.position, "history": history}
            checkpoint.save_step(working, int(state.step), state, record)
            return str(working / f"{int(state.step):08d}")

        with bar(f"phase {phase.name}", phase.steps) as update:

            def report(progress: distill.Progress) -> None:
                history.append({"step": progress.step, **progress.metrics})
                update(progress.step, f"loss {progress.metrics['loss']:.4f}")

            state, _ = distill.train(
                step,
                state,
                data,
                steps=phase.steps,
                save=save,
                save_every=recipe.checkpoint_every,
                last_checkpoint=last,
                report=report,
            )
        return state, history

    def _export(self, params: Params) -> dict[str, Any]:
        directory = self.folder.export
        shutil.rmtree(directory, ignore_errors=True)
        dtype = jax.numpy.dtype(self.recipe.export.dtype)
        like = self.folder.path / "processor"
        self.processor.save_pretrained(like)
        save_model(self.config, jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), params), directory, like)
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
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        report = {"params": size, "scores": scores, "wall_seconds": time.time() - self.began, "seed": self.recipe.seed}
        write_json(self.folder.report / "report.json", report)
        return report


def save_model(config: LMMConfig, params: Params, directory: Path, processor: Path) -> None:
    """A checkpoint directory with a processor's files beside it.

    Args:
        config: the model.
        params: its parameters.
        directory: where to.
        processor: directory of the processor's files.
    """
    save_hf(config, params, directory)
    for path in sorted(processor.iterdir()):
        shutil.copyfile(path, directory / path.name)
