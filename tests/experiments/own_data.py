"""Helpers for runs on a user's own rows: small teachers for each family, the packaged recipes, and rows in a folder."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from typer.testing import CliRunner

from antgmm_jax.io.convert import save_hf
from data.record import prompt
from experiments import cli
from experiments.run.rows.datasets import load_both
from experiments.run.schema.recipe import load_training
from experiments.run.training import fresh, save_processor, shape_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "experiments" / "recipes"

_IMAGE = '"vision/layers"=2, "vision/embed"=64, "vision/mlp"=96'
_QUERIES = f'{_IMAGE}, "bridge/layers"=2, "bridge/embed"=64, "bridge/mlp"=96'
_T5 = f'{_QUERIES}, "encoder/layers"=2, "decoder/layers"=2, "text/embed"=48, "encoder/heads"=2, "encoder/mlp"=64'
_TEXT = '"text/layers"=2, "text/mlp"=64, "text/heads"'
SMALL = {
    "antgmm-tiny": _T5,
    "instructblip-tiny": _T5,
    "instructblip-llama-tiny": f'{_QUERIES}, {_TEXT}=1, "text/embed"=96',
    "blip2-opt-tiny": f"{_QUERIES}, {_TEXT}=2",
    "llava-tiny": f'{_IMAGE}, {_TEXT}=1, "text/embed"=48',
    "llava-onevision-tiny": f'{_IMAGE}, {_TEXT}=1, "text/embed"=96',
    "smolvlm-tiny": f'{_IMAGE}, {_TEXT}=1, "text/embed"=48',
    "internvl-tiny": f'{_IMAGE}, {_TEXT}=1, "text/embed"=96',
    "qwen3-vl-tiny": '"vision/layers"=3, "vision/embed"=64, "vision/mlp"=96, "text/layers"=3, "text/mlp"=64'
    ', "text/heads"=1, "text/embed"=48',
    "qwen2.5-vl-tiny": f"{_IMAGE}, {_TEXT}=1",
    "gemma3-tiny": f'{_IMAGE}, {_TEXT}=1, "text/embed"=48',
    "ministral-3-tiny": f'{_IMAGE}, {_TEXT}=1, "text/embed"=48',
}
"""Sizes of a teacher that takes seconds, for a preset of each family."""
ENCODERS = ("antgmm-tiny", "instructblip-tiny")
"""Presets of models with an encoder: they have recipes of their own."""
CHATLESS = ("antgmm-tiny", "blip2-opt-tiny", "instructblip-tiny", "instructblip-llama-tiny")
"""Presets of models without a chat template."""
DEEPSTACK = ("qwen3-vl-tiny",)
"""Presets of models that need two layers of the image encoder and two of the language model."""
TEMPLATE = "Question: {question}[ ({text})] Answer:"
FROZEN = 'phase.answers.frozen=["vision", "bridge"]'


def antgmm(command, recipe, run, *changes):
    """Runs a command on a recipe with changes."""
    options = [word for change in changes for word in ("--set", change)]
    return CliRunner().invoke(cli.app, [command, str(recipe), "--run", str(run), *options], prog_name="antgmm")


def recipe_of(preset, ending=""):
    """The packaged recipe that trains a preset or, with the ending "-compress", compresses it."""
    return RECIPES / f"own-data{'-t5' if preset in ENCODERS else ''}{ending}.toml"


def cut(preset):
    """The change of a packaged recipe that cuts the layers of a small model."""
    if preset in ENCODERS:
        sizes = '"vision/layers"=1, "bridge/layers"=1, "encoder/layers"=1, "decoder/layers"=1, "text/embed"=32'
    else:
        layers = 2 if preset in DEEPSTACK else 1
        sizes = f'"vision/layers"={layers}, "text/layers"={layers}, "text/mlp"=0.5'
    return f"stage.cut.sizes={{{sizes}}}"


def tiny(preset):
    """Changes to a packaged training recipe that make it take seconds."""
    changes = ("optimizer.batch_size=8", "optimizer.warmup=1", "data.samples=24", "evaluate.data.samples=8")
    changes = [*changes, "evaluate.max_new_tokens=4", "export.dtype=float32"]
    return [
        *changes,
        f"model.preset={preset}",
        f"model.sizes={{{SMALL[preset]}}}",
        "phase.answers.steps=3",
        FROZEN,
    ]


def save_untrained(preset, folder):
    """Saves a small model of a preset with random parameters and a tokenizer of the rows, in seconds."""
    recipe = load_training(recipe_of(preset), [*tiny(preset), "buckets=[]"])
    student, processor = fresh(recipe, shape_of(recipe), load_both(recipe)[0])
    with TemporaryDirectory() as like:
        save_processor(processor, Path(like), student.config)
        save_hf(student.config, student.load(), folder, like=like)


def as_conversations(file):
    """Rewrites the rows of a file as conversations in LLaVA's format."""
    rows = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        turns = [
            {"from": "human", "value": f"<image>\n{prompt(row.pop('question'), row.pop('text', ''), TEMPLATE)}"},
            {"from": "gpt", "value": row.pop("answer")},
        ]
        rows.append(json.dumps({**row, "conversations": turns}) + "\n")
    file.write_text("".join(rows))
