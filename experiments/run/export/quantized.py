"""Quantized exports, scored beside the export that they were made of."""

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from antgmm_jax.extras import require
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.hub import upload_command
from antgmm_jax.io.loading import load_processor
from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.processes import is_first, run_on_first
from data.encoding import decode
from experiments.run.batch_size import answering
from experiments.run.export.card import CARD, SERVED, UNSCORED, URL
from experiments.run.export.in_torch import cpu_model, placed, split, stop_at, torch_answers
from experiments.run.export.publishing import fresh_alone
from experiments.run.export.schemes import Scheme
from experiments.run.host.console import bar, say
from experiments.run.rows.datasets import encoded, load_records
from experiments.run.rows.samples import Samples
from experiments.run.schema import Recipe
from experiments.run.scores.evaluation import metrics, too_long

QUESTIONS = 320
"""Test records that a run's quantized export answers."""
_BATCH = 32
_CARD = """
## Quantized

The matrices in the layers of the language model are stored as {scheme} by compressed-tensors, rounded to nearest;
vLLM reads them; `transformers`, with `compressed-tensors` installed, needs
`model.hf_quantizer.compressor.decompress_model(model)` after loading. Answered in PyTorch, {count} questions have an
exact match of {after:.3f}, before {before:.3f} ({change:+.1f} points); {equal} answers are equal. Their ROUGE-L is
{rouge_after:.3f}, before {rouge_before:.3f} ({rouge_change:+.1f} points). The figures above are those before
quantization.
"""


class Loss(NamedTuple):
    """What quantization changes.

    Attributes:
        scheme: the numbers.
        before: exact match of the export in PyTorch, the mean over question types.
        after: that of the quantized one.
        rouge_before: ROUGE-L of the export, which says more about free text.
        rouge_after: that of the quantized one.
        equal: number of equal answers.
        count: number of questions.
        bytes_before: bytes of the weights.
        bytes_after: those of the quantized ones.
    """

    scheme: str
    before: float
    after: float
    rouge_before: float
    rouge_after: float
    equal: int
    count: int
    bytes_before: int
    bytes_after: int

    @property
    def points(self) -> float:
        """Points of exact match that are lost; negative if it answers better."""
        return 100 * (self.before - self.after)

    @property
    def rouge_points(self) -> float:
        """Points of ROUGE-L that are lost."""
        return 100 * (self.rouge_before - self.rouge_after)


def quantize_export(recipe: Recipe, export: Path, scheme: Scheme) -> None:
    """Writes a quantized copy beside the export of a run, scored on its first test records; see `publish_quantized`.

    Args:
        recipe: recipe of the run.
        export: its export.
        scheme: the numbers.
    """

    def publish() -> None:
        rows = load_records(recipe.evaluate.data.model_copy(update={"samples": samples}))
        questions = encoded(recipe, rows, load_processor(export), open_hf(export)[0])
        publish_quantized(export, scheme, questions, recipe.evaluate.max_new_tokens)

    samples = min(QUESTIONS, recipe.evaluate.data.samples)
    run_on_first(publish)


def advise_upload(export: Path, scheme: Scheme, name: str) -> None:
    """Says how to upload the quantized copy of an export, which `--push` does not.

    Args:
        export: Hugging Face directory.
        scheme: the numbers.
        name: value of `--push`; "" for no upload, of which nothing is said.
    """
    if name and is_first():
        copy = scheme.beside(export)
        command = upload_command(copy, f"{name}-{scheme.value}")
        say(f"note: --push uploads {export} alone; the quantized copy is uploaded by `{command}`")


def publish_quantized(export: Path, scheme: Scheme, samples: Samples, max_new_tokens: int) -> Loss:
    """Writes a quantized copy beside an export, atomically, and scores both in PyTorch, also on the model's card.

    A line says how many right answers are too long to be given.

    Args:
        export: Hugging Face directory; the copy is in `scheme.beside(export)`, an existing one is replaced.
        scheme: the numbers.
        samples: encoded questions.
        max_new_tokens: maximum length of answers.

    Returns:
        What it changes.

    Raises:
        AntgmmError: compressed-tensors is not installed, or the model cannot be quantized; nothing is written then.
    """
    require("quantize", "torch")
    from experiments.run.export.quantizing import quantize

    if line := too_long(samples.rows.index.answer, max_new_tokens):
        say(line)
    out = scheme.beside(export)
    with fresh_alone(out) as hidden:
        without_kernel = quantize(export, hidden, scheme.value)
        fits = answering(open_hf(export)[0], min(_BATCH, len(samples)), max_new_tokens)
        with sharding.without_mesh():  # this process answers all rows
            (old, before), (new, after) = (_scored(one, samples, fits, max_new_tokens) for one in (export, hidden))
        equal = sum(map(str.__eq__, before, after))
        sizes = (sum(file.stat().st_size for file in one.glob("*.safetensors")) for one in (export, hidden))
        exact, rouge = ((old[name], new[name]) for name in ("exact_match", "rouge_l"))
        loss = Loss(scheme.value, *exact, *rouge, equal, len(before), *sizes)
        if (card := hidden / CARD).exists():
            card.write_text(_card(card.read_text("utf-8"), loss), "utf-8")
    say(
        f"{out}: {loss.bytes_after / 1e6:.1f} MB (before {loss.bytes_before / 1e6:.1f}), exact match {loss.after:.3f}"
        f" ({loss.before:.3f}, {loss.points:.1f} points lost), ROUGE-L {loss.rouge_after:.3f} ({loss.rouge_before:.3f},"
        f" {loss.rouge_points:.1f} points lost) on {loss.count} questions, {equal} answers equal"
    )
    if without_kernel:
        widths = ", ".join(map(str, without_kernel))
        say(f"note: vLLM has no kernel for {scheme.value} with {widths} inputs: choose multiples of 32, or w8a8")
    return loss


def _card(text: str, loss: Loss) -> str:
    """The card of a quantized copy, from that of the export: other advice, and what quantization changes."""
    served = (
        f"On a CPU, vLLM runs this copy with `--dtype {Scheme(loss.scheme).cpu_dtype}`. `antgmm eval --data DATA --url"
        f" {URL}` scores the server on your own rows, with the prompt of training as `--prompt`; it does not read this"
        " folder itself."
    )
    text = text.replace(UNSCORED, "The scores of this copy are at the end.").replace(SERVED, served)
    return text + _CARD.format(**loss._asdict(), change=-loss.points, rouge_change=-loss.rouge_points)


def _scored(
    directory: Path, samples: Samples, fits: Callable[..., int], max_new_tokens: int
) -> tuple[Mapping[str, Any], list[str]]:
    """Scores and answers of a checkpoint in PyTorch."""
    model, (eos, pad) = _loaded(directory), samples.end_tokens
    stop_at(model, eos=eos, pad=pad)
    tokens = np.zeros((len(samples), max_new_tokens), np.int64)
    with bar(f"answers of {directory.name.strip('.')}", len(samples)) as update:
        done = 0
        for batch in samples.questions(fits):
            tokens[batch["index"]] = torch_answers(model, split(batch)[1], max_new_tokens, pad)
            update(done := done + len({*batch["index"]}), "")
    answers = decode(load_processor(directory), tokens, samples.encoder.opening)
    return metrics(samples.records, answers), answers


def _loaded(directory: Path) -> Any:
    """A checkpoint in PyTorch, as `torch_model` but unpacked, without the library's bars."""
    with redirect_stderr(io.StringIO()):
        model = cpu_model(directory)
        if quantizer := getattr(model, "hf_quantizer", None):
            from compressed_tensors.offload import remove_dispatch

            quantizer.compressor.decompress_model(model)
            remove_dispatch(model)  # else the library keeps the weights where they were unpacked, whatever `to` says
    # After unpacking, which takes several times the room of the packed weights.
    return placed(model)
