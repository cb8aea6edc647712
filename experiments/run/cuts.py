"""What a stage cuts: the sizes that its segments end at, and what the cut model starts from."""

from collections.abc import Mapping

import jax
import numpy as np

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import IMAGE_SIDE, LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete
from antgmm_jax.io import checkpoint
from antgmm_jax.pure import Params, float32, functional
from experiments.run.features import freezes_features
from experiments.run.schema import Stage


def new_weights(config: LMMConfig, source: str, seed: int) -> Params:
    """Parameters of a cut model that keeps none of the teacher's: what a control starts from.

    Args:
        config: the cut model.
        source: "random", or the folder of a finished phase of `antgmm train`, laid over random ones.
        seed: of the random ones.

    Returns:
        float32 parameters.

    Raises:
        AntgmmError: no such phase, or one of another shape.
    """
    params = functional(config).init(jax.random.key(seed))
    trained = {} if source == "random" else checkpoint.load_stage(source)[0]["params"]
    laid = {**params, **trained}
    if jax.tree.map(np.shape, laid) != jax.tree.map(np.shape, params):
        raise AntgmmError(f"{source} trained another shape than this cut: give its recipe the same model.sizes")
    return float32(config, laid)


def reads_features(config: LMMConfig, stage: Stage, targets: Mapping[str, int]) -> bool:
    """Whether a stage trains on image features that are computed once: nothing that they depend on moves.

    Args:
        config: the model that the stage finds.
        stage: the stage.
        targets: axis -> size that it cuts to.

    Returns:
        Whether it runs no image side.
    """
    cut = any(axis.split("/")[0] in IMAGE_SIDE for axis in complete(config, targets))
    return freezes_features(config, stage.frozen) and not (cut or stage.loss.vision)


def segment_targets(config: LMMConfig, stage: Stage) -> list[dict[str, int]]:
    """The sizes that each segment of a stage ends at: equal parts of the way, each the next legal size above.

    Args:
        config: the model that the stage finds.
        stage: its sizes and segments.

    Returns:
        One {axis: size} a segment; the last is the stage's own.

    Raises:
        AntgmmError: an illegal size, naming the nearest legal ones, or one that would grow an axis.
    """
    present = sizes(config)
    final = pruning.resolve(config, stage.sizes)
    found = []
    for segment in range(1, stage.segments):
        part = {
            axis: present[axis] + round((n - present[axis]) * segment / stage.segments) for axis, n in final.items()
        }
        found.append(pruning.legal_above(config, part))
    return [*found, final]
