"""Preparation of the rows of a recipe for later runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.loading import load_processor
from data.prepared import prepare
from experiments.run.host.console import bar
from experiments.run.rows.datasets import encoder_of, load_records
from experiments.run.schema.recipe import load_any


def prepare_rows(path: Path, overrides: Sequence[str], out: Path) -> dict[str, Any]:
    """Encodes the rows that a recipe trains on, with the processor and the settings of its runs.

    Args:
        path: TOML file of a recipe.
        overrides: see `load_recipe`.
        out: folder to write.

    Returns:
        `records`, `dropped`, `bytes` and `fingerprint`.

    Raises:
        AntgmmError: the recipe or its rows are invalid, or its tokenizer does not exist before its first run.
    """
    recipe = load_any(path, overrides)
    if not recipe.start:
        raise AntgmmError(f"{path} trains a preset, and its tokenizer is learnt from the rows: set model.path")
    encoder = encoder_of(recipe, load_processor(recipe.start), open_hf(recipe.start)[0])
    rows = prepare(load_records(recipe.data), encoder, out, shown=bar)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {"records": len(rows), "dropped": rows.dropped, "bytes": size, "fingerprint": rows.index.fingerprint}
