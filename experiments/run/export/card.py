"""The model card of an export: README.md with front matter for the Hub."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family, inputs
from antgmm_jax.families.common.words import user_turn
from antgmm_jax.io import hub
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.files import read_json
from antgmm_jax.io.loading import CONFIG, load_processor
from data.record import prompt
from experiments.run.export.completion import UNBOUNDED, positions
from experiments.run.export.export_gate import GateResult
from experiments.run.files import write_text
from experiments.run.host.console import count
from experiments.run.markdown import fenced, inline, markdown_table
from experiments.run.rows.prompts import records_prompt
from experiments.run.schema import Data, Recipe, Training
from pruning.costs import parameters

CARD = "README.md"
QUESTION, TEXT = "what is shown?", "text that belongs to the image"
"""Question and text of the examples."""
URL = "http://127.0.0.1:8000/v1"
UNSCORED = "This model has not been scored: `antgmm eval` does it."
SERVED = (
    f"The export check computes in float32, which is `--dtype float32` here. `antgmm eval . --data DATA --url {URL}`"
    " scores the server on your own rows and counts answers equal to those of JAX."
)
"""Advice that the card of a quantized copy replaces."""
_TEMPLATE = Path(__file__).with_name("card.md")
_LICENCE = re.compile(r"[\w.+-]{1,64}")
_LONGEST = 1 << 20
"""Bytes of the largest card from which a licence is read."""


class Origin(NamedTuple):
    """How a model was made.

    Attributes:
        how: verbs such as "pruned and distilled".
        source: the checkpoint that it was made from, a directory or a name of the Hub; "" for random parameters.
        taught: whether the source was its teacher.
    """

    how: str
    source: str
    taught: bool = False


class Score(NamedTuple):
    """Scores of the model on a data set, and those of its teacher if there is one.

    Attributes:
        data: name of the data set.
        model: result of `data.metrics.scores`.
        teacher: the same, or None.
    """

    data: str
    model: Mapping[str, Any]
    teacher: Mapping[str, Any] | None = None


def origin_of(recipe: Recipe | Training) -> Origin:
    """Returns how the model of a run was made."""
    if isinstance(recipe, Recipe):
        return Origin("pruned and distilled", recipe.start, taught=True)
    return Origin("trained" if recipe.start else "trained from random parameters", recipe.start)


def title_of(directory: Path) -> str:
    """Returns the heading of an export's card: the name of its folder, or of its run, or of its search and its run."""
    directory = directory.resolve()
    run = directory.parent if directory.name == "export" else directory
    return f"{run.parent.name}-{run.name}" if run.name.isdecimal() else run.name


def described(data: Data) -> str:
    """Returns the name of a data set, without the folders of a path."""
    if data.kind == "maad":
        return f"MAAD-synth, tier {data.tier}, {data.split}"
    return f"`{inline(Path(data.path).name)}`"


def write_card(
    directory: Path,
    config: LMMConfig,
    origin: Origin,
    template: str,
    *,
    title: str,
    gate: GateResult | None = None,
    scores: Sequence[Score] = (),
) -> None:
    """Writes the model card of an export, atomically; an equal one stays as it is.

    Args:
        directory: Hugging Face directory.
        config: config of its model.
        origin: how it was made.
        template: prompt template; the card has it if the directory records one, else it asks the bare question.
        title: heading of the card.
        gate: result of the export check; None without one.
        scores: scores by data set.
    """
    source = open_hf(origin.source)[0] if origin.source else None
    name = inline(str(hub.parse(origin.source) or title_of(Path(origin.source)))) if origin.source else ""
    recorded, most = records_prompt(directory), positions(directory)
    facts = {
        "title": inline(title),
        "origin": origin,
        "source": name,
        "parameters": _sizes(config, source, name),
        "axes": _axes(config, source, name),
        "recorded": recorded,
        "template": fenced(template),
        "gate": gate,
        "scores": [(score, _score(score)) for score in scores],
        "unscored": UNSCORED,
        "vllm": family(config).vllm(config),
        "served": SERVED,
        "positions": most,
        "length": min(UNBOUNDED, most),  # a server takes memory for the whole length
        **_example(directory, config, template if recorded else "{question}"),
    }
    card = ModelCard.from_template(_front_matter(directory, origin), str(_TEMPLATE), **facts)
    place, text = directory / CARD, str(card)
    if not place.exists() or place.read_bytes() != text.encode():
        write_text(place, text)


def _front_matter(directory: Path, origin: Origin) -> ModelCardData:
    made = ["pruned", "distilled"] if origin.taught else ["pruned"] if "pruned" in origin.how else []
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["antgmm-jax", *made, read_json(directory / CONFIG)["model_type"]],
        **_base_model(origin.source),
        **licence(origin.source),
    )


def _base_model(source: str) -> dict[str, str]:
    """The name on the Hub of a checkpoint, if it has one."""
    if repository := hub.parse(source) if source else None:
        return {"base_model": repository.id}
    cached = next((part for part in Path(source).resolve().parts if part.startswith("models--")), "")
    _, *names = cached.split("--")
    return {"base_model": "/".join(names)} if len(names) == 2 else {}


def licence(source: str) -> dict[str, Any]:
    """Returns the fields `license`, `license_name` and `license_link` of a checkpoint's card or config.json.

    Args:
        source: Hugging Face directory or name of the Hub; "" for none.

    Returns:
        Field -> value; empty if it names no licence.
    """
    if not source:
        return {}
    directory = hub.local(source)
    fields = {**read_json(directory / CONFIG), **_card_fields(directory / CARD)}
    name = fields.get("license")
    if not isinstance(name, str) or not _LICENCE.fullmatch(name):
        return {}
    more = {key: fields[key] for key in ("license_name", "license_link") if isinstance(fields.get(key), str)}
    return {"license": name, **more}


def _card_fields(card: Path) -> dict[str, Any]:
    """Front matter of a card; empty if it cannot be read."""
    if not card.is_file() or card.stat().st_size > _LONGEST:
        return {}
    try:
        fields: Any = metadata_load(card)
    except Exception:  # of any YAML
        return {}
    return fields if isinstance(fields, dict) else {}


def _sizes(config: LMMConfig, source: LMMConfig | None, name: str) -> str:
    """Parameters by tower and in total, beside those of the source."""
    new, old = parameters(config), parameters(source) if source else {}
    pairs = [(tower, new.get(tower, 0), old.get(tower, 0)) for tower in dict.fromkeys([*old, *new])]
    pairs.append(("total", sum(new.values()), sum(old.values())))
    if source is None:
        return markdown_table(["tower", "parameters"], [(tower, count(n)) for tower, n, _ in pairs])
    rows = [(tower, count(n), count(was), f"{was / n:.1f}x" if n else "-") for tower, n, was in pairs]
    return markdown_table(["tower", "parameters", f"`{name}`", "fewer"], rows)


def _axes(config: LMMConfig, source: LMMConfig | None, name: str) -> str:
    """Sizes by axis, and beside a source only those that differ; "" if there are none."""
    new, old = sizes(config), sizes(source) if source else {}
    rows = [(axis, new.get(axis, 0), old.get(axis, 0)) for axis in dict.fromkeys([*old, *new])]
    if source is None:
        return markdown_table(["axis", "units"], [(f"`{axis}`", str(n)) for axis, n, _ in rows])
    cut = [(f"`{axis}`", str(n), str(was)) for axis, n, was in rows if n != was]
    return markdown_table(["axis", "units", f"`{name}`"], cut) if cut else ""


def _score(score: Score) -> str:
    """Exact match by question type, and ROUGE-L of all answers, of the model and of its teacher."""
    models = [score.model, *([score.teacher] if score.teacher else [])]
    rows = [("mean over types", *(f"{one['exact_match']:.3f}" for one in models))]
    for kind in score.model["by_type"]:
        shown = inline(kind) or "-"
        rows.append((shown, *(f"{one['by_type'].get(kind, math.nan):.3f}" for one in models)))
    rows.append(("ROUGE-L of all", *(f"{one['rouge_l']:.3f}" for one in models)))
    return markdown_table(["question type", "this model", "teacher"][: 1 + len(models)], rows)


def _example(directory: Path, config: LMMConfig, template: str) -> dict[str, Any]:
    """The prompt of the examples: the line of a user turn, or the whole text for a model without a chat template."""
    line = prompt(QUESTION, TEXT if "{text}" in template else "", template)
    chat, text = True, line
    try:
        reads = inputs(config, load_processor(directory))
        chat, text = bool(reads.processor.chat_template), reads.chat(user_turn(line, 1))
    except AntgmmError:  # the checkpoint has no processor
        pass
    return {"line": repr(line), "chat": chat, "text": repr(text), "decoder_only": not config.encoder_decoder}
