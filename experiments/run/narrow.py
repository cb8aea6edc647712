"""Parameters of two bytes: which a checkpoint has, and which a stage keeps so because it does not train them."""

from collections.abc import Mapping
from pathlib import Path

import jax
from flax.traverse_util import unflatten_dict

from antgmm_jax.config import LMMConfig
from antgmm_jax.io import checkpoint
from antgmm_jax.pure import Params, abstract
from distill.adapters import ADAPTERS, shapes_with_adapters
from distill.state import state_dtypes
from distill.trainable import by_path, under
from experiments.run.cuts import projected_by
from experiments.run.schema import Work

Narrow = Mapping[str, str]
"""Path of a parameter -> its dtype of two bytes; all other parameters are float32."""


def narrow_of(params: Params) -> dict[str, str]:
    """Returns the parameters that are stored in two bytes.

    Args:
        params: parameters, or their shapes.
    """
    dtypes, _ = by_path(state_dtypes(params, [*params]))
    return {path: dtype.name for path, dtype in dtypes.items() if dtype.itemsize == 2}


def narrow_of_stage(directory: str | Path) -> dict[str, str]:
    """Returns the parameters that a finished stage holds in two bytes, from its record alone.

    Args:
        directory: folder of the stage, `stages/NN-name`.
    """
    arrays = checkpoint.stage_shapes(directory)
    return narrow_of(unflatten_dict({tuple(name.split(".")): leaf for name, leaf in arrays.items()})["params"])


def held_by(work: Work, config: LMMConfig, narrow: Narrow) -> dict[str, str]:
    """Returns the parameters that the state of a stage holds in two bytes.

    Args:
        work: the stage.
        config: config of the model before it.
        narrow: parameters of that model in two bytes.
    """
    changed = projected_by(work.stage, config)
    held = {path: dtype for path, dtype in narrow.items() if any(under(path, prefix) for prefix in work.narrow)}
    return {path: dtype for path, dtype in held.items() if path not in changed}


def left_by(work: Work, config: LMMConfig, narrow: Narrow) -> dict[str, str]:
    """Returns the parameters that are in two bytes after a stage: maps are float32 once adapters are added to them.

    Args:
        work: the stage.
        config: config of the model before it.
        narrow: parameters of that model in two bytes.
    """
    held, adapters = held_by(work, config, narrow), work.stage.adapters
    if adapters:
        for path in shapes_with_adapters(abstract(config), adapters)[ADAPTERS]:
            held.pop(path, None)
    return held


def with_dtypes(shapes: Params, narrow: Narrow) -> Params:
    """Returns the shapes of float32 parameters, with those of two bytes.

    Args:
        shapes: `jax.ShapeDtypeStruct`s of float32.
        narrow: the others; paths of parameters that are cut are ignored.
    """
    leaves, treedef = by_path(shapes)
    made = [jax.ShapeDtypeStruct(leaf.shape, narrow.get(path, leaf.dtype)) for path, leaf in leaves.items()]
    return treedef.unflatten(made)
