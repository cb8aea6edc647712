"""Commands about one checkpoint: import, cost, shrink and export."""

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require
from data.limits import LONGEST_ANSWER, MOST_TOKENS
from experiments.commands.output import (
    MODELS,
    CheckData,
    CheckSamples,
    CheckTokens,
    Json,
    Length,
    Maybe,
    Preset,
    Prompt,
    Push,
    Quantize,
    check_push,
    emit,
    upload,
)
from experiments.commands.sources import (
    FORMS,
    check_prompts,
    config_of,
    dtypes,
    name_of,
    records,
    sizes_given,
    template,
)
from experiments.run.host.console import count, say, table

if TYPE_CHECKING:
    from antgmm_jax.config import LMMConfig

Model = Annotated[Path, typer.Argument(metavar="MODEL", help=f"{MODELS}.")]


class DType(StrEnum):
    """Dtypes for export."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def import_(model: Model, as_json: Json = False) -> None:
    """Check every tensor and the chat template of a checkpoint, and list its axes with their legal sizes."""
    say(f"import: checking every tensor of {model}")
    import jax

    from antgmm_jax.axes import sizes
    from antgmm_jax.io.convert import open_hf
    from antgmm_jax.pure import local_axes

    config, params = open_hf(model)
    for leaf in jax.tree.leaves(params):
        for _ in leaf.parts():  # reading checks the values; the model need not fit into memory
            pass
    chat = _chat(model, config)
    local, present = local_axes(config), sizes(config)
    axes = {
        axis: {"size": size, "local": axis in local, **_legal(config, axis, size)} for axis, size in present.items()
    }
    figures = {
        "family": config.family,
        "dtypes": dtypes(params),
        **_cost(config, **_request(config)),
        "axes": axes,
        "chat": chat,
    }
    rows = [
        (axis, f["size"], "local" if f["local"] else "shared", _runs(f["legal"]), ", ".join(f["tied"]))
        for axis, f in axes.items()
    ]
    shown = table(["axis", "units", "in each layer", "legal sizes", "tied axes"], rows, "Axes that can be pruned")
    title = f"{model}: {config.family}, {', '.join(figures['dtypes'])}"
    emit(figures, as_json, title, _sizes(figures), shown, _chat_line(chat))


def _chat(model: Path, config: "LMMConfig") -> dict[str, Any] | None:
    """A question about a picture as the model reads it; None without a processor."""
    from antgmm_jax.io.hub import local
    from experiments.run.export.served_prompt import question_about_a_picture

    files = ("processor_config.json", "preprocessor_config.json")
    return question_about_a_picture(model, config) if any((local(model) / name).exists() for name in files) else None


def _chat_line(chat: Mapping[str, Any] | None) -> str:
    if chat is None:
        return "no processor: save the model's processor in its directory before training on rows"
    by = "by the chat template" if chat["template"] else "no chat template"
    warning = f"; warning: {chat['warning']}" if chat["warning"] else ""
    return f"{by}: a question about a picture is {chat['text']!r}, {chat['tokens']} tokens{warning}"


def _legal(config: "LMMConfig", axis: str, size: int) -> dict[str, Any]:
    """Legal sizes of an axis if only it and its tied axes change, and the tied axes."""
    from antgmm_jax.families import complete
    from pruning.planning import illegal_reason

    legal = [n for n in range(1, size + 1) if not illegal_reason(config, {axis: n})]
    return {"legal": legal, "tied": sorted(set(complete(config, {axis: legal[0]})) - {axis}) if legal else []}


def _runs(numbers: list[int]) -> str:
    """Formats sizes; abbreviates equal steps as `first, second ... last`."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) < 4 or len(steps) > 1:
        return ", ".join(map(str, numbers)) or "none"
    return f"{numbers[0]} to {numbers[-1]}" if steps == {1} else f"{numbers[0]}, {numbers[1]} ... {numbers[-1]}"


def cost(
    model: Maybe = None,
    preset: Preset = "",
    batch: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Samples per request.")] = 1,
    length: Length = 0,
    answer: Annotated[int, typer.Option(min=1, max=LONGEST_ANSWER, help="Answer tokens.")] = 16,
    as_json: Json = False,
) -> None:
    """Compute parameters, FLOPs, bytes and KV cache of a request, by tower and phase."""
    name = name_of(model, preset)
    say(f"cost: computing the cost of a request to {name}")
    config = config_of(model, preset)
    request = _request(config, batch, length, answer)
    figures = {"family": config.family, **request, **_cost(config, **request)}
    shown = table(["phase", "tower", "FLOPs", "bytes (bfloat16)"], _by_phase(figures), "Cost of a request")
    cache = f"KV cache at the end: {count(figures['kv_cache'])}B"
    emit(figures, as_json, f"{name}: {config.family}", _sizes(figures), shown, cache)


def _request(config: "LMMConfig", batch: int = 1, length: int = 0, answer: int = 16) -> dict[str, int]:
    from experiments.run.rows.random_batches import usual_length

    return {"batch": batch, "length": usual_length(config, length), "answer": answer}


def _cost(config: "LMMConfig", batch: int, length: int, answer: int) -> dict[str, Any]:
    import pruning

    result = pruning.cost(config, batch, length, answer)
    return {"params": sum(result.parameters.values()), **result._asdict()}


def _sizes(figures: Mapping[str, Any]) -> Any:
    rows = [(tower, count(n)) for tower, n in figures["parameters"].items()]
    return table(["tower", "parameters"], [*rows, ("total", count(figures["params"]))])


def _by_phase(figures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for phase, towers in figures["flops"].items():
        for tower, flops in towers.items():
            yield phase, tower, count(flops), count(figures["bytes"][phase][tower])


class Measure(StrEnum):
    """Ways to score units."""

    ACTIVATION = "activation"
    MAGNITUDE = "magnitude"


def shrink(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to create.")],
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=SIZE", help="Units to keep, or a fraction (with a decimal point). Can be repeated."),
    ] = None,
    like: Annotated[str, typer.Option(metavar="PRESET", help="Use all sizes of a preset instead.")] = "",
    data: Annotated[
        str, typer.Option(metavar="DATA", help=f"Rows to score units on, {FORMS}; the model must fit into memory.")
    ] = "",
    samples: Annotated[int, typer.Option(min=1, help="Maximum number of these rows, from the first.")] = 64,
    importance: Annotated[
        Measure, typer.Option(help="activation (layers: block influence) on --data; or magnitude, which is far worse.")
    ] = Measure.ACTIVATION,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Maximum size of a file, such as 500MB.")] = "5GB",
    disk: Annotated[bool, typer.Option("--disk", help="Also measure the time to copy the same bytes.")] = False,
    as_json: Json = False,
) -> None:
    """Prune a checkpoint without training. With `--importance magnitude` it need not fit into memory."""
    if bool(size) == bool(like):
        raise AntgmmError("shrink needs either --size or --like")
    if (importance is Measure.ACTIVATION) != bool(data):
        raise AntgmmError(
            "shrink scores units by their activations on a few of your rows: add --data jsonl:PATH; without rows,"
            " --importance magnitude reads the weights alone and loses far more"
        )
    if not re.fullmatch(r"\d*[1-9]\d*[KMGT]B", max_shard_size):
        raise AntgmmError(f"--max-shard-size {max_shard_size}: write it as 500MB or 5GB")
    say(f"shrink: pruning {model} to {like or ', '.join(size or ())}, into {out}")
    from antgmm_jax.io.convert import open_hf
    from experiments.run.disk_cut import cut, shown, targets_of

    targets = sizes_given(size) if size else targets_of(open_hf(model)[0], like)
    rows = records(data, samples, fewer=True) if data else None
    figures = cut(model, targets, out, records=rows, max_shard_size=max_shard_size, disk=disk)
    emit(figures, as_json, *shown(figures))


def export(
    stage: Annotated[Path, typer.Argument(metavar="STAGE", help="A finished stage, RUN/stages/NN-name.")],
    like: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="The teacher (directory or hf:ORG/NAME), to copy tokenizer and settings from."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to create.")],
    dtype: Annotated[DType, typer.Option(help="Dtype of the tensors.")] = DType.BFLOAT16,
    data: CheckData = "",
    samples: CheckSamples = 32,
    prompt: Prompt = "",
    max_new_tokens: CheckTokens = 0,
    push: Push = "",
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Export a stage as a Hugging Face directory, after checking that transformers and JAX give equal results."""
    require("torch", *(["quantize"] if quantize else []))
    if quantize and not data:
        raise AntgmmError("--quantize scores answers: add --data with questions")
    for place in (out, *([quantize.beside(out)] if quantize else [])):
        if place.exists():
            raise AntgmmError(f"{place} exists: choose another name or remove it")
    say(f"export: writing {stage} to {out} and checking it with PyTorch")
    check_push(push)
    from experiments.run.export.card import Origin
    from experiments.run.export.completion import ends_of
    from experiments.run.export.publishing import Questions, publish
    from experiments.run.student import load_student

    student = load_student(stage)
    _same_family(student.config, like)
    if quantize:
        from experiments.run.export.schemes import check_scheme

        check_scheme(student.config, quantize)
    prompt_template = template(prompt or _prompt_of_run(stage), like)
    batches, chats, tokens = check_prompts(student.config, like, data, samples, prompt_template, max_new_tokens)
    questions = Questions(batches, tokens, *ends_of(like, student.config), chats)
    result = publish(
        student.config,
        student.weights(),
        out,
        like,
        dtype=dtype.value,
        prompt=prompt_template,
        origin=Origin("pruned and distilled", str(like), taught=True),
        questions=questions,
    )
    assert result is not None  # never None with questions and one process
    if quantize:
        from antgmm_jax.io.loading import load_processor
        from experiments.run.export.quantized import advise_upload, publish_quantized
        from experiments.run.rows.samples import Samples

        answered = Samples(
            records(data, samples, fewer=True), load_processor(out), student.config, prompt=prompt_template
        )
        publish_quantized(out, quantize, answered, tokens)
        advise_upload(out, quantize, push)
    # Last: a failed upload has a command of its own, but the export cannot be repeated where it is.
    upload(out, push)
    rows = [
        ("largest difference of logits", f"{result.max_abs_logit_diff:.2g}"),
        ("largest logit", f"{result.max_abs_logit:.3g}"),
        ("equal answers", f"{100 * result.answers_equal:.0f} % of {result.prompts}"),
    ]
    emit({"directory": str(out), **result._asdict()}, as_json, table(["export gate", ""], rows), f"model: {out}")


def _prompt_of_run(stage: Path) -> str:
    """The prompt template in the recipe of a stage's run; "" if it names none, or the stage has left its run."""
    from experiments.run.schema.recipe import read_toml

    recipe = stage.absolute().parent.parent / "recipe.toml"
    return str(read_toml(recipe, "recipe").get("prompt", "")) if recipe.exists() else ""


def _same_family(config: "LMMConfig", like: Path) -> None:
    from antgmm_jax.io.convert import open_hf

    family = open_hf(like)[0].family
    if family != config.family:
        raise AntgmmError(f"{like} has family {family}, the stage {config.family}: specify the teacher's directory")


COMMANDS = {
    "import": (import_, "antgmm import experiments/teachers/maad-m"),
    "export": (export, "antgmm export runs/demo/stages/03-settle --like experiments/teachers/maad-m --out student"),
    "shrink": (
        shrink,
        "antgmm shrink checkpoints/large --out checkpoints/small --like antgmm-300m --data jsonl:ads/train.jsonl",
    ),
    "cost": (cost, "antgmm cost --preset antgmm-5b --length 256 --answer 32"),
}
